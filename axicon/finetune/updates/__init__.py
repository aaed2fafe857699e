"""How parameters are updated, by the name recipes call it."""

from axicon.finetune.updates.adamw import AdamW
from axicon.finetune.updates.forward_grad import ForwardGrad
from axicon.finetune.updates.hybrid import Hybrid
from axicon.finetune.updates.sgd import SGD
from axicon.finetune.updates.zo2 import ZO2
from axicon.finetune.updates.zo_adam import ZoAdam
from axicon.finetune.updates.zo_conservative import ZoConservative
from axicon.finetune.updates.zo_momentum import ZoMomentum
from axicon.finetune.updates.zo_sgd import ZoSGD
from axicon.finetune.updates.zo_sign import ZoSign
from axicon.protocols import UpdateRule

UPDATE_RULES: dict[str, type[UpdateRule]] = {
    "adamw": AdamW,
    "forward_grad": ForwardGrad,
    "hybrid": Hybrid,
    "sgd": SGD,
    "zo2": ZO2,
    "zo_adam": ZoAdam,
    "zo_conservative": ZoConservative,
    "zo_momentum": ZoMomentum,
    "zo_sgd": ZoSGD,
    "zo_sign": ZoSign,
}
