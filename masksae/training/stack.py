"""The dense step of many SAEs as one, which a GPU records once and repeats: a CUDA graph.

At 4,096 latents the products of a step take a fifth of a millisecond on a large GPU, and to start its hundred short
kernels one by one takes five times as long. So the SAEs of one architecture are stacked: their tensors get one more
dimension in front, and `dense_terms`, the definition of the loss, is mapped over it by `torch.vmap`. Then products,
selection, Adam and all the rest are one kernel for all of them. And the whole step, from a batch in a buffer to the new
weights, is captured; from then on it is one launch.

Nothing in it depends on the host: learning rate, coefficients, thresholds, counters and the dead live on the device.
What does is decided before it, and is a `Phase`: whether AuxK can have work, whether the threshold is estimated, which
penalties are due. Each phase has a graph of its own; there are at most a handful. A phase is run as it is a few times
before it is captured, on CPUs always. What cannot be captured is run kernel by kernel: rules that are not `stacked`
each alone by their own `Trainer`, and the steps of penalties that draw on the host (more latents than `chunk`).

Each SAE keeps its own `Trainer`, whose tensors are views of the stack's: checkpoints, snapshots, histories and errors
know of no stack.
"""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from masksae.activations import between_pools
from masksae.memory import MOST_STACKED
from masksae.saes.config import SAEConfig
from masksae.saes.loss import Outcome, dense_terms
from masksae.saes.penalties import due, penalty_loss
from masksae.saes.sae import SAE
from masksae.training.step import EPS, Trainer, Update, moments

WARM_UP = 3
"""Steps of a phase that are run as they are before it is captured: libraries make their work space in them."""


@dataclass(frozen=True)
class Phase:
    """What the host decides about a step; steps of one phase are the same work on the device."""

    dead_after: int | None
    """Tokens of silence from which AuxK revives a latent; None: no latent can be dead."""
    estimate: bool
    """Whether the threshold follows; with which memory:"""
    ema: float
    controlled: bool
    """Whether the controller of the coefficient is at work."""
    due: tuple
    """The penalties."""
    fixed: bool
    """Whether it can be captured."""


class Stack(Update):
    """SAEs that differ in their seed and their view of the stream only, as one trainer: every tensor of `sae` is [m,
    ...].

    members  their trainers, whose tensors become views of the stack's
    views    number of the view that each of them sees, in the order in which `step` gets them
    pool     handle of the memory in which its graphs work; None: one of its own
    """

    def __init__(self, members: list[Trainer], views: list[int], pool=None):
        sae, rule = members[0].sae, members[0].sae.config.selection
        self.members, self.config, self.steps = members, members[0].config, members[0].steps
        self.sae = Stacked([member.sae for member in members])
        where = self.sae.device
        for name in ("coefficient", "failed"):
            setattr(self, name, torch.stack([getattr(member, name) for member in members]))
            for i, member in enumerate(members):
                setattr(member, name, getattr(self, name)[i])
        self.lr, self.ramp = (torch.zeros((), dtype=self.sae.dtype, device=where) for _ in range(2))
        self.number = torch.zeros((), dtype=torch.int64, device=where)
        options = dict(fused=where.type in ("cpu", "cuda"), foreach=False, capturable=where.type == "cuda")
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=0.0, betas=rule.betas, eps=EPS, **options)
        self._share_moments(sae)
        self.views = sorted(set(views))
        self.seen = torch.tensor([self.views.index(view) for view in views], device=where)
        self.known = 0, 0  # steps done, tokens for which some latent had been silent then
        self.graphs = Graphs(where, pool) if where.type == "cuda" else None

    def _share_moments(self, sae: SAE) -> None:
        for name, _ in sae.named_parameters():
            whole = getattr(self.sae, name)
            state = self.adam.state[whole] = moments(whole, self.adam)
            for i, member in enumerate(self.members):
                parts = {key: value if key == "step" else value[i] for key, value in state.items()}
                member.adam.state[getattr(member.sae, name)] = parts

    def step(self, views: list[list[Tensor]], step: int, record: bool = False) -> None:
        """One update of every SAE. views: of each of `self.views` the scaled batch [B, d], and the target if there is
        one."""
        phase = self.phase(step, len(views[0][0]))
        self.schedule(step)
        inputs = [torch.stack(tensors) for tensors in zip(*views)]
        if self.graphs is None or not phase.fixed:
            outcome = self.update(inputs, phase, step)
        else:
            outcome = self.graphs(phase, inputs, lambda held: self.update(held, phase, step))
        if record:
            self._note(inputs[-1], outcome, step)

    def schedule(self, step: int) -> None:
        """Put what follows from the step's number where the device finds it."""
        self.lr.fill_(self.config.lr_at(step))
        self.ramp.fill_(self._ramp(step))
        self.number.fill_(step)

    def phase(self, step: int, batch: int) -> Phase:
        """Of a step on so many tokens."""
        sae, penalties = self.sae.config, tuple(due(self.sae.config, step))
        return Phase(
            dead_after=self._dead_after(batch, step),
            estimate=self._estimates(step),
            ema=self.config.threshold_ema,
            controlled=self._controlled(step),
            due=penalties,
            fixed=all(penalty.fixed(sae) for penalty in penalties),
        )

    def update(self, inputs: list[Tensor], phase: Phase, step: int) -> Outcome:
        """The whole step on [views, B, d]; `step` matters to penalties that are not `fixed` only."""
        alike = len(self.views) == 1
        x, *target = (t.expand(len(self.members), -1, -1) if alike else t[self.seen] for t in inputs)
        outcome = self.gradients(x, step, *target, phase=phase)
        self._update_(outcome, x.shape[1], self.number, phase.controlled)
        self._descend(self.lr)
        return outcome

    @torch.no_grad()
    def gradients(self, x: Tensor, step: int, target: Tensor | None = None, phase: Phase | None = None) -> Outcome:
        """Fill every parameter's `.grad` and change nothing else. x, target [m, B, d]."""
        sae, rule, phase = self.sae, self.sae.config.selection, phase or self.phase(step, x.shape[1])
        target = x if target is None else target
        with self._autocast():
            xc = x - sae.b_dec[:, None] if rule.centred else x
            pre = (xc @ sae.W_enc + sae.b_enc[:, None]).detach().requires_grad_()
            leaves = {name: value.detach().requires_grad_() for name, value in sae.named_parameters()}
            with torch.enable_grad():
                loss, residual, f = self._terms(leaves, target, pre, phase)
                if phase.due:
                    loss = loss + self._penalties(leaves, f, step)
                wanted = [pre, *leaves.values()]
                grad_pre, *found = torch.autograd.grad(loss.sum(), wanted, allow_unused=True)
            for parameter, grad in zip(sae.parameters(), found):
                parameter.grad = grad if grad is None else _laid_out(grad, parameter)
            self._encoder_gradients(xc, grad_pre)
        active = f.detach() > 0
        smallest = None
        if phase.estimate:
            smallest = torch.vmap(lambda f: rule.smallest(f, None, len(f)))(f.detach())
        fired, l0 = active.any(1), active.sum((1, 2)).to(sae.dtype) / x.shape[1]
        return Outcome(loss.detach(), residual, fired, l0, smallest)

    def _terms(self, leaves: dict[str, Tensor], target: Tensor, pre: Tensor, phase: Phase):
        """`dense_terms` of each SAE."""
        first = self.members[0].sae

        def terms(tensors, target, pre, weight):
            return with_tensors(first, tensors, dense_terms, target, pre, weight, phase.dead_after)

        return torch.vmap(terms)(leaves | dict(self.sae.named_buffers()), target, pre, self.coefficient * self.ramp)

    def _penalties(self, leaves: dict[str, Tensor], f: Tensor, step: int) -> Tensor:
        """[m], one SAE after the other: chunks are drawn from a seed of its own."""
        norms, found = f.norm(dim=1, dtype=self.sae.dtype), []
        for i, member in enumerate(self.members):
            tensors = {name: value[i] for name, value in leaves.items()}
            found.append(with_tensors(member.sae, tensors, penalty_loss, norms[i], step, f.shape[1]))
        return torch.stack(found)

    def _encoder_gradients(self, xc: Tensor, grad_pre: Tensor) -> None:
        """As `loss.encoder_gradients`; W_enc's gradient has the strides of W_enc."""
        sae = self.sae
        sae.W_enc.grad = (grad_pre.mT @ xc).to(sae.dtype).mT
        b_enc = grad_pre.sum(1, dtype=sae.dtype)
        sae.b_enc.grad = b_enc if sae.b_enc.grad is None else sae.b_enc.grad + b_enc
        if sae.config.selection.centred:
            sae.b_dec.grad = sae.b_dec.grad - (sae.W_enc @ b_enc[..., None])[..., 0]

    def _dead_after(self, batch: int, step: int) -> int | None:
        """As of a trainer; None also where no latent can be dead by what was known of the counters some steps ago."""
        if self.sae.config.aux is None:
            return None
        dead_after = self.sae.config.aux.dead_after(self.steps * batch)
        then, silent = self.known
        return dead_after if silent + (step - then + 1) * batch >= dead_after else None

    def look(self, steps_done: int) -> None:
        """Wait for the device, and see for how long the most silent latent has been so."""
        if self.sae.config.aux is not None:
            self.known = steps_done, int(self.sae.tokens_since_fired.max())

    def _clip_(self) -> None:
        """Each SAE's gradient as its own trainer would."""
        grads = [p.grad for p in self.sae.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dim=tuple(range(1, grad.ndim))) for grad in grads]
        factor = (self.config.clip / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.view(-1, *[1] * (grad.ndim - 1)))

    def _project_(self) -> None:
        for member in self.members:
            member._project_()

    def _note(self, x: Tensor, outcome: Outcome, step: int) -> None:
        for i, (member, view) in enumerate(zip(self.members, self.seen.tolist())):
            of_one = {"loss": outcome.loss[i], "residual": outcome.residual[i], "l0": outcome.l0[i]}
            member._record(x[view], replace(outcome, **of_one), step)

    def dissolve(self) -> None:
        """Give every SAE memory of its own again."""
        for member in self.members:
            for value in (*member.sae.parameters(), *member.sae.buffers()):
                value.data = value.data.clone()  # keeps the strides


class Stacked(nn.Module):
    """The tensors of several SAEs of one architecture, [m, ...] each; the SAEs become views of it."""

    def __init__(self, saes: list[SAE]):
        super().__init__()
        self.config = saes[0].config
        for name, _ in saes[0].named_parameters():
            whole = _stack([getattr(sae, name).data for sae in saes])
            self.register_parameter(name, nn.Parameter(whole))
            for i, sae in enumerate(saes):
                getattr(sae, name).data = whole[i]
        for name, _ in saes[0].named_buffers():
            whole = torch.stack([getattr(sae, name) for sae in saes])
            self.register_buffer(name, whole)
            for i, sae in enumerate(saes):
                setattr(sae, name, whole[i])

    device, dtype = SAE.device, SAE.dtype


def _laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with the strides of its parameter, as fused Adam wants it; hardly ever a copy."""
    return grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)


def _stack(tensors: list[Tensor]) -> Tensor:
    """[m, ...], each entry with the strides that it had: W_enc stays stored latent by latent."""
    first = tensors[0]
    whole = torch.empty_strided((len(tensors), *first.shape), (first.numel(), *first.stride()), dtype=first.dtype,
                                device=first.device)  # fmt: skip
    for part, tensor in zip(whole, tensors):
        part.copy_(tensor)
    return whole


class _Called(nn.Module):
    def __init__(self, sae: SAE):
        super().__init__()
        self.sae = sae

    def forward(self, function, *arguments):
        return function(self.sae, *arguments)


def with_tensors(sae: SAE, tensors: dict[str, Tensor], function, *arguments):
    """function(sae, *arguments) with other tensors in place of the SAE's own."""
    return functional_call(_Called(sae), {f"sae.{name}": value for name, value in tensors.items()},
                           (function, *arguments))  # fmt: skip


class Graphs:
    """CUDA graphs of one stack, by phase. They share memory, those of all stacks of a group, for no two run at once and
    nothing of theirs is read after the next: the weights, Adam's state and the inputs lie outside, in buffers that
    stay.

    To be used inside `own_stream`: the default stream cannot be captured."""

    def __init__(self, device: torch.device, pool=None):
        self.device, self.pool = device, pool or torch.cuda.graph_pool_handle()
        self.inputs: list[Tensor] = []
        self.runs: dict[Phase, int] = {}
        self.captured: dict[Phase, tuple[torch.cuda.CUDAGraph, Outcome]] = {}

    def __call__(self, phase: Phase, inputs: list[Tensor], update) -> Outcome:
        """What `update` of the inputs gives: by running it while the phase is new, then by repeating it."""
        self.runs[phase] = self.runs.get(phase, 0) + 1
        if self.runs[phase] <= WARM_UP:
            return update(inputs)
        if [tensor.shape for tensor in inputs] != [tensor.shape for tensor in self.inputs]:
            self.inputs, self.captured = [tensor.clone() for tensor in inputs], {}
        for held, tensor in zip(self.inputs, inputs):
            held.copy_(tensor)
        if phase not in self.captured:
            graph = torch.cuda.CUDAGraph()
            with between_pools(), torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                outcome = update(self.inputs)
            self.captured[phase] = graph, outcome
        graph, outcome = self.captured[phase]
        graph.replay()
        return outcome


@contextlib.contextmanager
def own_stream(device: torch.device):
    """On a GPU, work in a stream that can be captured."""
    if device.type != "cuda":
        yield
        return
    outside, inside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    inside.wait_stream(outside)
    try:
        with torch.cuda.device(device), torch.cuda.stream(inside):
            yield
    finally:
        outside.wait_stream(inside)


def stacks(trainers: list[Trainer], views: list[int]) -> tuple[list[Stack], list[int]]:
    """The trainers whose rules are `stacked` in stacks of at most `MOST_STACKED`, and the numbers of the others."""
    alike: dict[SAEConfig, list[int]] = {}
    for i, trainer in enumerate(trainers):
        alike.setdefault(trainer.sae.config.alike, []).append(i)
    found, alone = [], []
    pool = torch.cuda.graph_pool_handle() if trainers[0].sae.device.type == "cuda" else None
    for config, numbers in alike.items():
        if not config.selection.stacked:
            alone += numbers
            continue
        for low in range(0, len(numbers), MOST_STACKED):
            part = numbers[low : low + MOST_STACKED]
            found.append(Stack([trainers[i] for i in part], [views[i] for i in part], pool))
    return found, alone
