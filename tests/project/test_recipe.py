"""Recipes: what is typed, what comes out, and the line a mistake gets."""

from __future__ import annotations

import hashlib

import pytest

from axicon.errors import AxiconError
from axicon.model.shape import ModelShape
from axicon.recipe import EvaluateRecipe, LocalServeRecipe, ServeRecipe
from axicon.settings import fields, parse_overrides


def test_the_field_decides_what_a_typed_value_becomes() -> None:
    words = ["port=8001", "served_name=1", "kv_gib=0.5", "offline=true", "limits.n=3", "threads=none"]
    recipe = LocalServeRecipe.parse(words, model="demo")
    assert (recipe.port, recipe.served_name, recipe.kv_gib, recipe.offline) == (8001, "1", 0.5, True)
    assert recipe.limits.n == 3
    assert recipe.limits.stops == ServeRecipe().limits.stops
    assert recipe.threads is None


def test_lists_are_typed_with_commas_or_brackets() -> None:
    assert EvaluateRecipe.parse(["tasks=sst2, rte"]).tasks == ("sst2", "rte")
    assert EvaluateRecipe.parse(["tasks=[sst2, 1]"]).tasks == ("sst2", "1")


def test_a_template_is_text() -> None:
    for text in ("{{ text }} It was", "{% if a %}b{% endif %}"):
        assert parse_overrides([f"data.template={text}"]) == {"data": {"template": text}}


def test_overrides_win_over_values_key_by_key() -> None:
    recipe = ServeRecipe.parse(["limits.n=2"], limits={"n": 5, "stops": 1}, max_rows=4)
    assert (recipe.limits.n, recipe.limits.stops, recipe.max_rows) == (2, 1, 4)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("prot=1", "unknown key 'prot': did you mean 'port'?"),
        ("limits.stop=1", "unknown key 'limits.stop': did you mean 'limits.stops'?"),
        ("zzzz=1", "unknown key 'zzzz': known are model,"),
        ("port=99999", "port=99999: must be less than or equal to 65535 (port to listen on)"),
        ("port=http", "port=http: must be a valid integer"),
        ("port=none", "port=none: must be a valid integer"),
        ("dtype=fp8", "dtype=fp8: must be 'bfloat16' or 'float32'"),
        ("kv_gib=nan", "kv_gib=nan: must be a finite number"),
        ("limits=3", "limits=3: limits has settings of its own, such as limits.body_bytes=..."),
        ("api_key_hashes=secret", "api_key_hashes.0: must match pattern '^[0-9a-f]{64}$'"),
        ("port", "cannot read 'port': settings are given as key=value, for example port=8001"),
        ("=1", "cannot read '=1'"),
        ("a..b=1", "cannot read 'a..b=1'"),
        ("tasks=[a", "tasks=[a: the brackets do not close"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(word: str, says: str) -> None:
    with pytest.raises(AxiconError) as caught:
        LocalServeRecipe.parse([word])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_key_is_given_once() -> None:
    with pytest.raises(AxiconError, match="port is given twice"):
        parse_overrides(["port=1", "port=2"])
    with pytest.raises(AxiconError, match="limits already has a value of its own"):
        parse_overrides(["limits=1", "limits.n=2"])


def test_every_setting_says_what_it_is() -> None:
    for recipe in (LocalServeRecipe, EvaluateRecipe):
        assert all(about for _, about in fields(recipe))
        assert ("limits.n", "choices of one prompt") in set(fields(LocalServeRecipe))


def test_app_args_are_what_the_application_takes() -> None:
    recipe = LocalServeRecipe.parse(["port=8001", "limits.n=3"], model="x")
    args = recipe.app_args()
    assert "port" not in args
    assert ServeRecipe.model_validate(args).limits.n == 3


def test_the_shown_recipe_reads_back_the_same() -> None:
    import yaml

    recipe = LocalServeRecipe.parse(["limits.n=3", "allowed_hosts=a,b"], model="x")
    assert LocalServeRecipe.model_validate(yaml.safe_load(recipe.as_yaml())) == recipe


def test_keys_from_the_environment_are_kept_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "one, two")
    recipe = ServeRecipe(api_keys_env="KEYS", api_key_hashes=("ab" * 32,))
    digests = recipe.api_key_digests()
    assert digests == (bytes.fromhex("ab" * 32), *(hashlib.sha256(k).digest() for k in (b"one", b"two")))


def test_keys_that_are_asked_for_and_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KEYS", raising=False)
    with pytest.raises(AxiconError, match="api_keys_env=KEYS: this environment variable holds no key"):
        ServeRecipe(api_keys_env="KEYS").api_key_digests()
    assert ServeRecipe().api_key_digests() == ()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compressor=gptq4"], "known are .*llm_int8"),
        (["compressor.method=llm_int8", "compressor.treshold=4"], "did you mean 'threshold'"),
        (["compressor.method=llm_int8", "compressor.threshold=x"], "must be a valid number"),
        (["compressor.method=llm_int8", "compressor.threshold=-1"], "negative"),
    ],
)
def test_a_wrong_method_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(AxiconError, match=said):
        ServeRecipe.parse(words).build_compressor()


def test_what_is_served_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("axicon.kernels.native.why_unavailable", lambda: None)
    default = repr(ServeRecipe().build_compressor())
    assert default == "LLMInt8(threshold=6.0, relative=5.0, head=True, skip=())"
    assert ServeRecipe.parse(["compressor=none"]).build_compressor() is None
    assert ServeRecipe.parse(["dtype=float32"]).build_compressor() is None
    named = ServeRecipe.parse(["compressor=llm_int8"])
    assert repr(named.build_compressor()) == "LLMInt8(threshold=6.0, relative=0.0, head=True, skip=())"
    assert ServeRecipe.model_validate(named.model_dump(mode="json")).compressor == named.compressor
    sizes = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    run_by_kernels = ModelShape.from_config(sizes)
    gated = ModelShape.from_config(sizes | {"attention_variant": {"gate": "linear"}})
    assert repr(ServeRecipe().build_compressor((), run_by_kernels)) == default
    assert ServeRecipe().build_compressor((), gated) is None, "int8 is slow in torch"
    assert named.build_compressor((), gated) is not None
    monkeypatch.setattr("axicon.kernels.native.why_unavailable", lambda: "no compiler")
    assert ServeRecipe().build_compressor() is None
    assert named.build_compressor() is not None
