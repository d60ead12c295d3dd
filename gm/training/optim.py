"""How the rows are updated: the section `optim` of a config, learning-rate schedules and loss scales.

All of this is arithmetic on a few numbers, done on the host in double precision; `gm.training.step` does the rest.
"""

import math
from dataclasses import dataclass, field

SCHEDULES = ("multi_step", "constant", "cosine")


@dataclass(frozen=True)
class OptimArgs:
    """AdamW with bias correction (Kingma and Ba 2015) and decoupled weight decay (Loshchilov and Hutter 2019)."""

    lr: float = 5e-4  # per update; not multiplied by batch size or ranks
    lr_clip_l: float | None = None  # of text encoder 1's rows, if another
    lr_clip_g: float | None = None  # of text encoder 2's rows, if another
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # of the learned rows; nothing else is trained
    schedule: str = "multi_step"
    warmup_steps: int = 0  # updates over which the learning rate rises linearly to lr
    milestones: list[int] = field(default_factory=list)  # multi_step: updates after which it is multiplied by gamma
    gamma: float = 0.3
    clip_grad: bool = True
    max_grad_norm: float = 1.0  # largest L2 norm of the gradient of all rows together
    loss_scale: str = "dynamic"  # for float16 networks: "dynamic", or a number

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule '{self.schedule}' is not one of {', '.join(SCHEDULES)}.")
        for name in ("lr", "lr_clip_l", "lr_clip_g", "eps", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"optim.{name} is {value}; it must be a positive number.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must be from 0 up to, not including, 1.")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("optim.weight_decay and optim.warmup_steps must not be negative.")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"optim.milestones {list(self.milestones)} must rise.")
        if self.loss_scale != "dynamic":
            try:
                positive = float(self.loss_scale) > 0
            except ValueError:
                positive = False
            if not positive:
                raise ValueError(f"optim.loss_scale '{self.loss_scale}' is neither 'dynamic' nor a positive number.")

    @property
    def base_rates(self):
        """Learning rates of the two encoders' rows before the schedule."""
        return tuple(self.lr if rate is None else rate for rate in (self.lr_clip_l, self.lr_clip_g))


def schedule_factor(optim, update, total_updates):
    """What the schedule multiplies the learning rate by.

    Args:
        optim: OptimArgs.
        update: number of the update, from 0; it may exceed total_updates (a run that was prolonged).
        total_updates: length of the run in updates; only "cosine" needs it.

    Returns:
        factor in (0, 1]; "cosine" ends at 0.01.
    """
    warmup = min(1.0, (update + 1) / (optim.warmup_steps + 1))
    if optim.schedule == "multi_step":
        return warmup * optim.gamma ** sum(update >= milestone for milestone in optim.milestones)
    if optim.schedule == "cosine":
        progress = min(1.0, max(0, update - optim.warmup_steps) / max(1, total_updates - optim.warmup_steps))
        return warmup * max(0.01, 0.5 * (1 + math.cos(math.pi * progress)))
    return warmup


class LossScale:
    """What a float16 network's loss is multiplied by, so that small gradients do not vanish (Micikevicius et al. 2018).

    A dynamic scale halves after an overflow and doubles after `window` updates without one; a static one stays.
    """

    def __init__(self, value, *, dynamic, window=1000):
        self.value, self.dynamic, self.window = float(value), dynamic, window
        self.good_updates = 0

    @classmethod
    def from_args(cls, loss_scale, *, half_precision):
        """The scale that `optim.loss_scale` asks for; 1 for float32 networks."""
        if not half_precision:
            return cls(1.0, dynamic=False)
        return cls(2.0**16, dynamic=True) if loss_scale == "dynamic" else cls(loss_scale, dynamic=False)

    def after_update(self, overflow):
        """Adapt. Returns whether training can go on: false when there is nothing left to lower."""
        if not overflow:
            self.good_updates += 1
            if self.dynamic and self.good_updates % self.window == 0:
                self.value = min(self.value * 2, 2.0**24)
            return True
        self.good_updates = 0
        if not self.dynamic or self.value <= 1:
            return False
        self.value /= 2
        return True

    def state_dict(self):
        return {"value": self.value, "good_updates": self.good_updates}

    def load_state_dict(self, state):
        self.value, self.good_updates = state["value"], state["good_updates"]
