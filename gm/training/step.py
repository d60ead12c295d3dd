"""One training step: loss, gradient of the learned rows, and an update every few steps."""

import math
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from gm import compile_cache
from gm.training.optim import LossScale, schedule_factor


class _ScaledLoss(nn.Cell):
    def __init__(self, loss_net):
        super().__init__(auto_prefix=False)
        self.loss_net = loss_net

    def construct(self, loss_scale, *inputs):
        return self.loss_net(*inputs) * loss_scale


class TrainOneStepCell(nn.Cell):
    """The compiled part of a step: one graph, whether or not the step ends with an update.

    Gradients of micro-batches are averaged in `accumulated`. Where `is_last`, their global norm is clipped and AdamW
    updates the rows (Loshchilov and Hutter 2019, algorithm 2), unless a gradient is not finite: then rows and moments
    stay as they are. What changes between the two cases is selected, not branched, so that the graph is static.

    Args:
        loss_net: cell whose inputs give a scalar loss.
        rows: Parameters to learn, one a text encoder; everything else is left alone.
        optim: OptimArgs.
        accumulation_steps: micro-batches an update.
        world_size: ranks whose gradients are averaged.
    """

    def __init__(self, loss_net, rows, optim, *, accumulation_steps, world_size=1):
        super().__init__(auto_prefix=False)
        self.rows = ParameterTuple(rows)
        self.accumulated = self.rows.clone("accumulated", init="zeros")
        self.first_moment = self.rows.clone("first_moment", init="zeros")
        self.second_moment = self.rows.clone("second_moment", init="zeros")
        self.loss_net = _ScaledLoss(loss_net)  # an attribute, so that the cell knows the network's parameters
        self.gradient = ms.value_and_grad(self.loss_net, None, weights=self.rows)
        self.beta1, self.beta2, self.eps, self.weight_decay = optim.beta1, optim.beta2, optim.eps, optim.weight_decay
        self.clip_grad, self.max_grad_norm = optim.clip_grad, optim.max_grad_norm
        self.share = 1.0 / accumulation_steps
        self.world_size = world_size
        if world_size > 1:
            self.all_reduce = ops.AllReduce(ops.ReduceOp.SUM)

    def construct(self, is_last, loss_scale, rates, corrections, *inputs):
        """
        Args:
            is_last: bool scalar, whether this micro-batch completes an update.
            loss_scale: float32 scalar.
            rates: (2,) learning rate of each encoder's rows.
            corrections: (2,) 1 / (1 - beta1^t) and 1 / (1 - beta2^t), t counting updates from 1.
            inputs: of the loss net.

        Returns:
            loss (mean over ranks), global gradient norm before clipping, and whether all gradients are finite.
        """
        scaled_loss, gradients = self.gradient(loss_scale, *inputs)
        loss = scaled_loss / loss_scale
        sums, square = (), ops.zeros((), ms.float32)
        for i in range(len(self.rows)):
            g = gradients[i] / loss_scale * self.share
            if self.world_size > 1:  # at every step, so that all ranks accumulate, and could save, the same
                g = self.all_reduce(g) / self.world_size
            g = self.accumulated[i] + g
            ops.assign(self.accumulated[i], ops.select(is_last, ops.zeros_like(g), g))
            sums += (g,)
            square = square + ops.reduce_sum(ops.square(g))
        if self.world_size > 1:
            loss = self.all_reduce(loss) / self.world_size
        norm = ops.sqrt(square)
        finite = ops.isfinite(norm)
        self.update(ops.logical_and(is_last, finite), norm, sums, rates, corrections)
        return loss, norm, finite

    def update(self, apply, norm, gradients, rates, corrections):
        clip = ops.zeros_like(norm) + 1.0
        if self.clip_grad:
            clip = self.max_grad_norm / ops.maximum(norm, self.max_grad_norm)
        for i in range(len(self.rows)):
            p, m, v = self.rows[i], self.first_moment[i], self.second_moment[i]
            g = gradients[i] * clip
            new_m = self.beta1 * m + (1 - self.beta1) * g
            new_v = self.beta2 * v + (1 - self.beta2) * ops.square(g)
            step = new_m * corrections[0] / (ops.sqrt(new_v * corrections[1]) + self.eps)
            new_p = p - rates[i] * (step + self.weight_decay * p)
            ops.assign(p, ops.select(apply, new_p, p))
            ops.assign(m, ops.select(apply, new_m, m))
            ops.assign(v, ops.select(apply, new_v, v))


@dataclass(frozen=True)
class StepResult:
    loss: float  # of this micro-batch, mean over ranks
    grad_norm: float  # of the gradients accumulated so far
    rate: float  # learning rate of encoder 1's rows at the present update
    updated: bool  # an update was applied
    overflow: bool  # an update was due and skipped, since a gradient was not finite


class Learner:
    """The host's part of training: counts updates, follows the schedule, adapts the loss scale, keeps the state.

    Args:
        loss_net, rows: as of TrainOneStepCell.
        optim: OptimArgs.
        accumulation_steps: micro-batches an update.
        total_steps: length of the run in micro-batches, for schedules that need it.
        half_precision: the network computes in float16, so the loss is scaled.
        world_size: ranks.
    """

    def __init__(
        self, loss_net, rows, optim, *, accumulation_steps, total_steps, half_precision=False, world_size=1
    ):
        self.rows = list(rows)
        self.optim = optim
        self.accumulation_steps = accumulation_steps
        self.total_updates = math.ceil(total_steps / accumulation_steps)
        self.loss_scale = LossScale.from_args(optim.loss_scale, half_precision=half_precision)
        self.half_precision = half_precision
        self.cell = TrainOneStepCell(
            loss_net, self.rows, optim, accumulation_steps=accumulation_steps, world_size=world_size
        )
        self.micro_step = 0  # of the present update
        self.updates = 0  # applied
        self.due = 0  # applied or skipped; the schedule counts these

    def __call__(self, *inputs):
        """Take one step.

        Args:
            inputs: of the loss net, numpy arrays.

        Returns:
            StepResult.

        Raises:
            FloatingPointError: loss or gradient is not finite, and no loss scale is left to lower. Rows are unchanged.
        """
        is_last = self.micro_step == self.accumulation_steps - 1
        factor = schedule_factor(self.optim, self.due, self.total_updates)
        rates = np.array([rate * factor for rate in self.optim.base_rates], np.float32)
        t = self.updates + 1
        corrections = [1 / (1 - self.optim.beta1**t), 1 / (1 - self.optim.beta2**t)]
        loss, norm, finite = compile_cache.call(
            self.cell, Tensor(is_last), Tensor(self.loss_scale.value, ms.float32), Tensor(rates),
            Tensor(corrections, ms.float32), *(Tensor(array) for array in inputs),
        )  # fmt: skip
        loss, norm, finite = float(loss.asnumpy()), float(norm.asnumpy()), bool(finite.asnumpy())
        if not self.half_precision and not (finite and math.isfinite(loss)):
            raise FloatingPointError(f"the loss is {loss} and its gradient's norm {norm}")
        self.micro_step = 0 if is_last else self.micro_step + 1
        if is_last:
            self.updates += finite
            self.due += 1
            if not self.loss_scale.after_update(overflow=not finite):
                raise FloatingPointError(f"gradients overflow at the loss scale {self.loss_scale.value:g}")
        return StepResult(loss, norm, float(rates[0]), updated=is_last and finite, overflow=is_last and not finite)

    def state_dict(self):
        """Arrays and numbers that continue the run exactly.

        Returns:
            (arrays: dict of numpy, numbers: JSON-serialisable dict).
        """
        arrays = {parameter.name: parameter.asnumpy().copy() for parameter in self._parameters()}
        numbers = {"micro_step": self.micro_step, "updates": self.updates, "due": self.due}
        return arrays, {**numbers, "loss_scale": self.loss_scale.state_dict()}

    def load_state_dict(self, arrays, numbers):
        """Continue from `state_dict()`.

        Raises:
            ValueError: the arrays are of another concept, number of vectors or model.
        """
        for parameter in self._parameters():
            if parameter.name not in arrays or arrays[parameter.name].shape != tuple(parameter.shape):
                found = arrays[parameter.name].shape if parameter.name in arrays else "missing"
                raise ValueError(f"state to resume: {parameter.name} is {found}, needed is {tuple(parameter.shape)}.")
        for parameter in self._parameters():
            parameter.set_data(Tensor(arrays[parameter.name]))
        self.micro_step, self.updates, self.due = (numbers[key] for key in ("micro_step", "updates", "due"))
        self.loss_scale.load_state_dict(numbers["loss_scale"])

    def _parameters(self):
        cell = self.cell
        return [*self.rows, *cell.accumulated, *cell.first_moment, *cell.second_moment]
