"""OmniQuant over all widths at once, one decoder layer at a time (MatQuant Eq. 3, 4, 5, 7).

    min over gamma, beta, s, delta of  sum_r lambda_r * || F(W, X) - F(slice(quantise(W), r), X_r) ||^2

F is one decoder layer, attention and FFN. The weights themselves are not trained: clipping (clip.py) chooses the grid
to which they are rounded, and an equivalent transformation (equivalence.py) chooses the numbers to round. X is the
layer's input in the float model, X_r its input in the r-bit model, with all earlier layers quantised. A layer needs
only its own weights and inputs, so a model of any size is trained in the memory of one layer.

Targets, per width: "truth" is the float layer's output on X; a teacher width's target is its output in the same step,
with stop-gradient (Table 4, "the outputs from a higher-precision model are used as the target"); the teacher "fp"
equals the truth. A width with several targets takes the mean of its losses. Losses are relative to the mean square of
the truth, which scales all gradients of a layer by one constant.

From the paper: constant learning rate 1e-3, 128 sequences of 2048 tokens in batches of 4, 10M tokens (1220 steps). Our
choices, where the paper states none: AdamW with torch's betas and no weight decay; beta and gamma are factors, s =
exp(log_scale), delta in units of the activations, so that one learning rate fits all. OmniQuant's own code uses 1e-2
for clipping and 5e-3 for the transformation (``clip_lr``, ``transform_lr``). bf16 autocast is supported, fp16 is not,
because gradients of 8-bit steps overflow in fp16 (OmniQuant issue 8).

Codes are made once per step and read by all widths. Cost per step: one forward and backward of the layer per width.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from matquant.core.tensor import NestedTensor
from matquant.distributed.collect import from_rank
from matquant.hf_torch.config import check_context
from matquant.methods import gptq
from matquant.methods.parts import clip, equivalence
from matquant.methods.parts.blocks import Block, Solved, calibration, run_blocks
from matquant.methods.parts.job import Job
from matquant.methods.parts.layer import Layer, check_losses
from matquant.methods.parts.readings import read_losses
from matquant.methods.parts.share import sum_gradients
from matquant.options.gptq import Settings as GptqSettings
from matquant.options.objective import FLOAT, Width
from matquant.options.omniquant import Settings


def run(job: Job) -> Iterator[tuple[str, NestedTensor]]:
    """Train the model block by block; see ``blocks.run_blocks``."""
    settings = Settings(**job.options)
    check_context(job.model, settings.seq_len)
    tokens = calibration(job, samples=settings.samples, seq_len=settings.seq_len, seed=settings.seed)
    return run_blocks(
        job,
        solve,
        streams=streams(job),
        tokens=tokens,
        batch_size=settings.batch_size,
        settings=dataclasses.asdict(settings),
        steps=True,
    )


def streams(job: Job) -> tuple[int, ...]:
    """Return the models whose activations a layer is trained on: the float model and every trained width."""
    return (FLOAT, *(width.bits for width in job.objective))


def solve(job: Job, block: Block) -> Solved:
    """Train one decoder layer; return its codes and its folded norms and biases.

    Raises InputError naming the layer and the width if the loss is not finite, or ends above the start and above the
    size of the layer's output.
    """
    settings = Settings(**job.options)
    layer = Layer(block, job.dtypes)
    targets = layer.targets(autocast=settings.autocast)
    learned, notice = _start(job, settings, layer)
    optimizer = _optimizer(learned, settings)
    before = _evaluate(job, settings, layer, learned, targets)
    if optimizer is not None:
        for step in range(settings.steps):
            losses = _step(job, settings, layer, learned, targets, layer.order(step, settings.seed))
            check_losses(losses, block.name, f"step {step + 1} of {settings.steps}")
            optimizer.step()
            optimizer.zero_grad()
            learned.keep_in_range()
    after = _evaluate(job, settings, layer, learned, targets)
    check_losses(after, block.name, f"the end of {settings.steps} steps", limits=before)
    with torch.no_grad():
        changed = learned.fold(layer)
        if settings.codes == "gptq":
            nested = _gptq(job, block, layer, changed)
            after = layer.distances(nested, targets, _widths(job), changed=changed, autocast=settings.autocast)
        else:
            nested = {
                path: clip.nest(weight, job.grid, learned.clips[path], name=path)
                for path, weight in layer.weights(changed)
            }
    record = {"loss": _named(after), "loss_before": _named(before), "steps": settings.steps}
    return Solved(
        nested=nested,
        plain=layer.plain(changed),
        record={**record, "notice": notice} if notice else record,
    )


# -------------------------------------------------------------------------------------------------------- the training


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Learned:
    """Everything that is trained in one layer."""

    rows: tuple[equivalence.Bound, ...]
    transforms: list[equivalence.Transform]
    clips: dict[str, clip.Clip]

    def fold(self, layer: Layer) -> dict[str, torch.Tensor]:
        return equivalence.fold(self.rows, self.transforms, layer.tensors, dtypes=layer.dtypes)

    def tensors(self) -> list[torch.Tensor]:
        """Return everything that is trained."""
        transforms = [tensor for t in self.transforms for tensor in (t.log_scale, t.shift) if tensor is not None]
        return [*(tensor for factors in self.clips.values() for tensor in factors.tensors()), *transforms]

    def keep_in_range(self) -> None:
        for factors in self.clips.values():
            clip.keep_in_range(factors)
        for transform in self.transforms:
            equivalence.keep_in_range(transform)


def _start(job: Job, settings: Settings, layer: Layer) -> tuple[_Learned, str]:
    block, notice = layer.block, ""
    rows: tuple[equivalence.Bound, ...] = ()
    if settings.transform:
        states = from_rank(layer.inputs(FLOAT, 0)[:1].clone(), 0)  # all processes must bind the same
        with torch.no_grad():
            rows, notice = equivalence.bind(
                block.name,
                layer.tensors,
                config=block.config.get_text_config(),
                quantised={view.parameter for view in block.views.values()},
                run=lambda changed: layer.run(states, changed, autocast=False) - states,
            )
    transforms = [equivalence.start(row, layer.tensors) for row in rows]
    trained = [width.bits for width in job.objective]
    clips = {
        path: clip.start(weight, job.grid, trained=trained, clip=settings.learn_clip)
        for path, weight in layer.weights({})
    }
    return _Learned(rows=rows, transforms=transforms, clips=clips), notice


def _optimizer(learned: _Learned, settings: Settings) -> torch.optim.Optimizer | None:
    """Return AdamW over everything learned; None if nothing is."""
    transforms = [tensor for t in learned.transforms for tensor in (t.log_scale, t.shift) if tensor is not None]
    factors = [tensor for factors in learned.clips.values() for tensor in factors.tensors()]
    for tensor in (*transforms, *factors):
        tensor.requires_grad_(True)
    groups = [
        {"params": factors, "lr": settings.clip_lr or settings.lr},
        {"params": transforms, "lr": settings.transform_lr or settings.lr},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay) if groups else None


def _step(
    job: Job, settings: Settings, layer: Layer, learned: _Learned, targets: list[torch.Tensor], index: int
) -> dict[int, float]:
    """Accumulate the gradients of one batch over all widths and processes; return the widths' losses."""
    losses = {width.bits: torch.zeros((), device=layer.device) for width in job.objective}

    def backward(piece: int, part: float) -> None:
        for bits, loss in _backward_piece(job, settings, layer, learned, targets, piece, part).items():
            losses[bits] += loss

    sum_gradients(layer.block.share, index, learned.tensors(), backward)
    return read_losses([losses])[0]


def _backward_piece(
    job: Job,
    settings: Settings,
    layer: Layer,
    learned: _Learned,
    targets: list[torch.Tensor],
    index: int,
    part: float,
) -> dict[int, torch.Tensor]:
    """Add the gradients of one piece over all widths, times its ``part`` of the batch; return the losses likewise.

    The steps that all widths share (folding, encoding) have one graph, cut from the graphs of the widths: each width's
    graph is freed before the next is made, and the shared graph is traversed once.
    """
    cuts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_(True)
        cuts.append((tensor, leaf))
        return leaf

    needed = dataclasses.replace(job.grid, sliced=tuple(w.bits for w in job.objective if w.bits in job.grid.sliced))
    changed = learned.fold(layer)
    simulated = {}
    for path, weight in layer.weights(changed):
        whole = clip.simulate(weight, needed, learned.clips[path], name=path)
        simulated[path] = dataclasses.replace(
            whole, position=cut(whole.position), scale=cut(whole.scale), zero=cut(whole.zero)
        )
    plain = {name: cut(tensor) for name, tensor in layer.plain(changed).items()}
    outputs = {FLOAT: targets[index].to(layer.device)}
    losses = {}
    for width in job.objective:
        reads = {path: clip.read(s, width.bits, needed, learned.clips[path]) for path, s in simulated.items()}
        output = layer.run(
            layer.inputs(width.bits, index), {**plain, **layer.assemble(reads)}, autocast=settings.autocast
        )
        loss = _loss(output, outputs, width) * part / layer.power
        if loss.requires_grad and width.weight:
            torch.autograd.backward(loss * width.weight)
        outputs[width.bits] = output.detach()
        losses[width.bits] = loss.detach()
    shared = [(root, leaf.grad) for root, leaf in cuts if leaf.grad is not None]
    if shared:
        torch.autograd.backward([root for root, _ in shared], [gradient for _, gradient in shared])
    return losses


def _loss(output: torch.Tensor, outputs: Mapping[int, torch.Tensor], width: Width) -> torch.Tensor:
    """Return the mean squared distance to a width's targets: the truth, if it is one, and its teachers' outputs."""
    sources = [FLOAT] * width.truth + list(width.teachers)
    return torch.stack([(output - outputs[source]).square().mean() for source in sources]).mean()


def _evaluate(
    job: Job, settings: Settings, layer: Layer, learned: _Learned, targets: list[torch.Tensor]
) -> dict[int, float]:
    """Return ||F_r - F||^2 / ||F||^2 over all batches, by width, against the float layer for every objective."""
    with torch.no_grad():
        changed = learned.fold(layer)
        nested = {
            path: clip.nest(weight, job.grid, learned.clips[path], name=path) for path, weight in layer.weights(changed)
        }
    return layer.distances(nested, targets, _widths(job), changed=changed, autocast=settings.autocast)


def _widths(job: Job) -> list[int]:
    return [width.bits for width in job.objective]


def _gptq(job: Job, block: Block, layer: Layer, changed: Mapping[str, torch.Tensor]) -> dict[str, NestedTensor]:
    """Run nested GPTQ on the transformed weights, with the Hessians of the transformed layer on the widest stream."""
    parameters = {f"{block.name}.{name}": parameter for name, parameter in block.module.named_parameters()}
    kept = {name: parameters[name].clone() for name in changed}
    try:
        for name, tensor in changed.items():
            parameters[name].copy_(tensor)
        nested, _ = gptq.nest_block(
            job, block, dict(layer.weights(changed)), damp=GptqSettings.damp, sweeps=GptqSettings.sweeps
        )
    finally:
        for name, tensor in kept.items():
            parameters[name].copy_(tensor)
    return nested


def _named(losses: Mapping[int, float]) -> dict[str, float]:
    return {str(bits): loss for bits, loss in losses.items()}
