"""The training loop: deterministic, resumable, and never worse on its validation text than what it started from."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration.checks import check_tokens
from ..errors import EigenAttnError
from ..journal import Journal
from ..models.checkpoint_format import checkpoint_of
from ..models.placement import input_device
from ..progress import TASK, TokenProgress
from .trainable import Trainable

STAGE = "training"
# A loss whose `exp` is still a number.
MOST_NATS = 709
# Seconds between saves (chosen: little to lose, and far less time than the work).
SAVE_SECONDS = 60.0
# Share of the steps over which the learning rate rises, and largest norm of a step's gradient (chosen, as is usual).
WARM_UP, LARGEST_GRADIENT = 0.05, 1.0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How to train. Rank, alpha and learning rate of the adapters are the paper's (arXiv 2408.05646).

    Args:
        steps: updates of the parameters.
        batch_size: windows a step; they pass the model one at a time, so memory does not grow with it.
        learning_rate: of Adam on adapters, at its height: it rises, then falls to zero by a cosine.
        map_learning_rate: the same on maps that are trained directly, in proportion to each row's size.
        lora_rank, lora_alpha: of the adapters on folded projections.
        validate_every: steps between validations.
        seed: of the order of windows and of the adapters.

    Raises:
        EigenAttnError: if a value is outside its range.
    """

    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 2e-4
    map_learning_rate: float = 2e-3
    lora_rank: int = 64
    lora_alpha: int = 64
    validate_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lora_rank", "lora_alpha", "validate_every"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise EigenAttnError(f"{name} must be a whole number of at least 1, not {value!r}.")
        for name in ("learning_rate", "map_learning_rate"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise EigenAttnError(f"{name} must be above 0, not {value!r}.")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return dataclasses.asdict(self)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, as a share of its height."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def windows_of_step(self, step: int, available: int) -> list[int]:
        """Which windows a step reads: every epoch is an order of its own, which follows from the seed alone."""
        chosen = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, offset = divmod(place, available)
            # A large odd factor keeps the orders of neighbouring seeds apart.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            chosen.append(int(torch.randperm(available, generator=generator)[offset]))
        return chosen


@dataclass(frozen=True)
class FinetuneReport:
    """What training did.

    Args:
        measure: what `before`, `after` and `validation` in the curve are: `perplexity`, or `divergence`, the mean KL
            divergence from the baseline's predictions, in nats a token.
        curve: `step`, mean `training` loss since the last entry (nats a token; none at step 0) and `validation`, which
            is infinite where training has diverged.
        best_step: the step whose parameters were kept; 0 means that nothing was better than the start.
    """

    measure: str
    before: float
    after: float
    best_step: int
    steps: int
    trained_parameters: int
    tokens: int
    seconds: float
    curve: list[dict[str, float | int | None]]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return dataclasses.asdict(self)


def finetune(
    model: PreTrainedModel,
    training: Tensor,
    validation: Tensor,
    config: FinetuneConfig | None = None,
    *,
    baseline: PreTrainedModel | None = None,
    journal: Journal | None = None,
    progress: bool = False,
) -> tuple[PreTrainedModel, FinetuneReport]:
    """Train what a compressed model's low rank left over; see `Trainable` for what that is.

    Dropout is off, and a step follows from the seed and its number alone. So a run that goes on from its journal gives
    the same bits as one that was never stopped, on the same machine.

    Args:
        model: a compressed model, in fp32 or bf16. It is changed in place.
        training, validation: token windows [N, T].
        baseline: the original model. With it the loss is the KL divergence from its predictions, without it the
            negative log-likelihood of the next token.
        journal: keeps the state of the training about once a minute, and is asked for it at the start.
        progress: show a progress bar on the error stream, if it is a terminal.

    Returns:
        The model with the parameters of the best validation, adapters merged; and what happened.

    Raises:
        EigenAttnError: if there is nothing to train, text or baseline do not fit, or the loss is not finite.
    """
    config = config or FinetuneConfig()
    _check(model, training, validation, baseline)
    device = input_device(model)
    model.eval()
    trainable = Trainable(model, config.lora_rank, config.lora_alpha, config.seed)
    state = _State(trainable, config)
    finished = journal.read(STAGE) if journal else None
    if finished is not None:
        state.restore(*finished)
    objective = _Objective(model, baseline, device)
    saved = time.monotonic()
    with TokenProgress(progress).bar("Training", config.steps) as bar:
        bar.advance(TASK, state.step)
        if not state.curve:
            state.judge(objective.validate(validation))
            if not math.isfinite(state.best_validation):
                raise EigenAttnError("this model's loss on the validation text is not finite: try --dtype float32.")
        while state.step < config.steps:
            start = time.perf_counter()
            chosen = config.windows_of_step(state.step, len(training))
            loss = sum(objective.descend(training[index], len(chosen)) for index in chosen)
            if not math.isfinite(loss):
                raise EigenAttnError(
                    f"the loss of step {state.step + 1} is not finite: lower the learning rate, or try --dtype float32."
                )
            state.update(loss)
            if state.step % config.validate_every == 0 or state.step == config.steps:
                state.judge(objective.validate(validation))
            state.seconds += time.perf_counter() - start
            bar.update(TASK, advance=1, rate=f"{objective.measure} {state.curve[-1]['validation']:.4g}")
            if journal and (time.monotonic() - saved > SAVE_SECONDS or state.step == config.steps):
                journal.write(STAGE, *state.to_save())
                saved = time.monotonic()
    trainable.load(state.best)
    best = next(entry for entry in state.curve if entry["validation"] == state.best_validation)
    return trainable.merge(), FinetuneReport(
        measure=objective.measure,
        before=state.curve[0]["validation"],
        after=best["validation"],
        best_step=best["step"],
        steps=config.steps,
        trained_parameters=trainable.count,
        tokens=config.steps * config.batch_size * training.shape[1],
        seconds=state.seconds,
        curve=state.curve,
    )


def _check(model: PreTrainedModel, training: Tensor, validation: Tensor, baseline: PreTrainedModel | None) -> None:
    if model.dtype == torch.float16:
        raise EigenAttnError("gradients underflow in float16: train with --dtype bfloat16 or float32.")
    checkpoint = checkpoint_of(model)
    window = getattr(checkpoint, "method", {}).get("window", 0)
    for windows in (training, validation):
        if windows.dim() != 2 or not len(windows):
            raise EigenAttnError(f"token windows must be [N, T] and at least one, not {tuple(windows.shape)}.")
        check_tokens(windows, model)
        if windows.shape[1] <= window + 1:
            raise EigenAttnError(
                f"windows of {windows.shape[1]} tokens lie within the {window} exact ones, where nothing is compressed"
                ": raise --length."
            )
    if baseline is not None:
        sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, baseline)]
        if sizes[0] != sizes[1]:
            raise EigenAttnError(f"the baseline has {sizes[1]} tokens in its vocabulary, and this model {sizes[0]}.")


class _Objective:
    """The loss of one window, in nats a token."""

    def __init__(self, model: PreTrainedModel, baseline: PreTrainedModel | None, device: torch.device) -> None:
        self.model, self.baseline, self.device = model, baseline, device
        self.measure = "perplexity" if baseline is None else "divergence"

    def _loss(self, window: Tensor) -> Tensor:
        ids = window.unsqueeze(0).to(self.device)  # [1, T]
        logits = self.model(ids, use_cache=False).logits[0].float()  # [T, vocabulary]
        if self.baseline is None:
            return F.cross_entropy(logits[:-1], ids[0, 1:])
        with torch.no_grad():
            exact = self.baseline(ids.to(self.baseline.device), use_cache=False).logits[0].float().log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), exact.to(logits.device), reduction="batchmean", log_target=True)

    def descend(self, window: Tensor, of: int) -> float:
        """Add the gradient of a window's loss, as one of `of` windows of a step, and give its share of the loss."""
        loss = self._loss(window) / of
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def validate(self, windows: Tensor) -> float:
        loss = sum(self._loss(window).item() for window in windows) / len(windows)
        if not loss < MOST_NATS:  # a NaN is not either
            return math.inf  # as bad as any
        return math.exp(loss) if self.baseline is None else loss


class _State:
    """Everything that a training step changes."""

    def __init__(self, trainable: Trainable, config: FinetuneConfig) -> None:
        self.trainable, self.config = trainable, config
        maps = [p for name, p in trainable.parameters.items() if name in trainable.maps]
        adapters = [p for name, p in trainable.parameters.items() if name not in trainable.maps]
        groups = [
            {"params": parameters, "height": height}
            for parameters, height in ((maps, config.map_learning_rate), (adapters, config.learning_rate))
            if parameters
        ]
        self.optimizer = torch.optim.Adam(groups)
        self.step = 0
        self.seconds = 0.0
        self.losses: list[float] = []  # of the steps since the last validation
        self.curve: list[dict[str, Any]] = []
        self.best, self.best_validation = self._values(), math.inf

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trainable.parameters.items()}

    def update(self, loss: float) -> None:
        """One step of Adam with the gradients there are."""
        self.trainable.take_gradients()
        nn.utils.clip_grad_norm_(self.trainable.parameters.values(), LARGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = group["height"] * self.config.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.trainable.apply()
        self.losses.append(loss)
        self.step += 1

    def judge(self, validation: float) -> None:
        """Add a point to the curve, and keep the parameters if they are the best so far."""
        if validation < self.best_validation:
            self.best, self.best_validation = self._values(), validation
        training = sum(self.losses) / len(self.losses) if self.losses else None
        self.curve.append({"step": self.step, "training": training, "validation": validation})
        self.losses = []

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values, from which `restore` goes on."""
        tensors = {f"parameter.{name}": value for name, value in self.trainable.parameters.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for name, parameter in self.trainable.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors, {"step": self.step, "seconds": self.seconds, "losses": self.losses, "curve": self.curve}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        def part(kind: str) -> dict[str, Tensor]:
            return {name: tensors[f"{kind}.{name}"] for name in self.trainable.parameters}

        self.step, self.seconds = values["step"], values["seconds"]
        self.losses, self.curve = values["losses"], values["curve"]
        self.trainable.load(part("parameter"))
        self.best, self.best_validation = part("best"), min(entry["validation"] for entry in self.curve)
        first, second = part("exp_avg"), part("exp_avg_sq")
        for name, parameter in self.trainable.parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": first[name].to(parameter.device),
                "exp_avg_sq": second[name].to(parameter.device),
            }
