"""Ways to guess what comes next, by the name requests call them.

A guess is a `DraftTree`. One step of the target computes all of it, `axicon.generate.verify` decides what of
it stays, and the result has the law, or the very bits, of a run without guesses.
"""

from axicon.generate.drafting.chain import Chain
from axicon.generate.drafting.independent import KSeq, MultiRound
from axicon.generate.drafting.lookup import Lookup
from axicon.generate.drafting.recursive import RSDC, RSDS
from axicon.protocols import Drafter

DRAFTERS: dict[str, type[Drafter]] = {
    "chain": Chain,
    "k_seq": KSeq,
    "lookup": Lookup,
    "multi_round": MultiRound,
    "rsd_c": RSDC,
    "rsd_s": RSDS,
}
