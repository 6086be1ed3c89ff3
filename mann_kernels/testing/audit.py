"""Finds the classic faults of LRUA cells, by running a cell against the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mann_kernels import reference


@dataclass(frozen=True)
class Finding:
    """One check of an audit, which raises nothing: its `name`, whether the cell passed (`ok`), and `evidence`, the numbers."""

    name: str
    ok: bool
    evidence: str


@dataclass(frozen=True)
class Audit:
    """All `findings` of an audit, which raises nothing: `ok` if every check passed, `faults` the names of those that failed."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)

    @property
    def faults(self) -> tuple[str, ...]:
        return tuple(finding.name for finding in self.findings if not finding.ok)

    def __str__(self) -> str:
        return "\n".join(f"{'ok   ' if f.ok else 'FAULT'} {f.name}: {f.evidence}" for f in self.findings)


def audit(
    step: Callable, *, controller: Callable | None = None, lru: str = "per_head", erase: str = "least", seed: int = 0
) -> Audit:
    """Run an LRUA cell of any make against the reference and name the faults that public implementations have.

    Args:
        step: `step(memory, usage, read_weights, key, gate) -> (reads, memory, usage, read_weights)` with the shapes of
            mann_kernels.lrua_step; wrap a cell of another layout in a function of this form.
        controller: what the cell feeds back to its controller, `controller(reads, read_weights) -> tensor` [B, ...];
            None leaves that check out. A correct cell feeds back the reads, R*W numbers.
        lru: the variant that the cell means to implement, as in mann_kernels.lrua_step.
        erase: the same.
        seed: of the random states.

    Returns:
        an Audit; `.faults` has the names, `str()` all findings with numbers. A cell that raises fails that check.
    """
    cell = _Cell(step, lru, erase, seed)
    checks = {
        "inverted erase": cell.inverted_erase,
        "most used instead of least used": cell.most_used,
        "all slots tied": cell.all_slots_tied,
        "batch leak": cell.batch_leak,
        "heads with zero gradient": cell.zero_gradient,
        "memory detached between steps": cell.detached,
    }
    if controller is not None:
        checks["read weights fed back instead of reads"] = lambda: cell.feedback(controller)
    findings = []
    for name, check in checks.items():
        try:
            with torch.device("cpu"):  # whatever the default is
                findings.append(Finding(name, *check()))
        except Exception as error:  # whatever a stranger's cell raises is a finding, not the end of the audit
            findings.append(Finding(name, False, f"the cell raised {type(error).__name__}: {error}"))
    return Audit(tuple(findings))


class _Cell:
    """The checks. Each returns (ok, evidence)."""

    B, N, W, R = 3, 12, 6, 2

    def __init__(self, step, lru, erase, seed):
        self._step, self.options = step, {"lru": lru, "erase": erase}
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, *tensors):
        """The cell gets tensors of its own, and what it gives is copied: it may write to both, at the next step too."""
        return tuple(tensor.clone() for tensor in self._step(*(tensor.clone() for tensor in tensors)))

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float32)

    def state(self):
        usage = torch.rand(self.B, self.N, generator=self.generator, dtype=torch.float32) + 0.1
        return self.normal(self.B, self.N, self.W), usage, self.normal(self.B, self.R, self.N).softmax(-1)

    def controls(self):
        return self.normal(self.B, self.R, self.W), self.normal(self.B, self.R)

    def inverted_erase(self):
        """Check that with nothing written (key 0) only the least-used rows are gone."""
        memory, usage, read_weights = self.state()
        key, gate = (torch.zeros_like(tensor) for tensor in self.controls())
        after = self.step(memory, usage, read_weights, key, gate)[1]
        want = reference.lrua_step(memory, usage, read_weights, key, gate, **self.options)[1]
        kept, should = (int((m[0].abs().sum(-1) > 0).sum()) for m in (after, want))
        return 2 * kept >= self.N, f"{kept} of {self.N} rows survive a step that writes nothing, {should} should"

    def most_used(self):
        """Check that with the gate shut the write goes to the slots of least usage."""
        memory, usage, read_weights = self.state()
        key = self.normal(self.B, self.R, self.W) * 100
        after = self.step(memory, usage, read_weights, key, self.normal(self.B, self.R) * 0 - 30)[1]
        moved = (after - memory).norm(dim=-1)[0]
        slot, least, most = int(moved.argmax()), int(usage[0].argmin()), int(usage[0].argmax())
        order = usage[0].argsort()
        return (
            slot in order[: self.R],
            f"the write went to slot {slot} (usage {usage[0, slot]:.2f}); least used is {least} ({usage[0, least]:.2f}),"
            f" most used {most} ({usage[0, most]:.2f})",
        )

    def all_slots_tied(self):
        """Check that with equal usage everywhere at most one slot per head is written to."""
        memory, _, read_weights = self.state()
        usage = self.normal(self.B, self.N) * 0 + 1
        key = self.normal(self.B, self.R, self.W) + 3
        gate = self.normal(self.B, self.R) * 0 - 30
        after = self.step(torch.zeros_like(memory), usage, read_weights, key, gate)[1]
        written = int((after[0].abs().sum(-1) > 1e-3).sum())
        return written <= self.R, f"{written} of {self.N} slots written to by {self.R} heads when all usages are equal"

    def batch_leak(self):
        """Check that what happens in example 0 is not seen in the others."""
        state, controls = self.state(), self.controls()
        before = self.step(*state, *controls)[0]
        changed = [tensor.clone() for tensor in (*state, *controls)]
        for tensor in changed:
            tensor[0] = tensor[0].flip(-1) * 1.5
        leak = float((self.step(*changed)[0][1:] - before[1:]).abs().max())
        return leak < 1e-6, f"changing example 0 moves the others' reads by {leak:.3g}"

    def zero_gradient(self):
        """A later read depends on what every head wrote."""
        state, first, second = self.state(), self.controls(), self.controls()
        key, gate = (tensor.clone().requires_grad_() for tensor in first)
        _, *after = self.step(*state, key, gate)
        reads = self.step(*after, *second)[0]
        loss = reads.square().sum()
        grads = torch.autograd.grad(loss, (key, gate), allow_unused=True) if reads.requires_grad else (None, None)
        grads = [torch.zeros_like(t) if g is None else g for t, g in zip((key, gate), grads, strict=True)]
        norms = [float(norm) for grad in grads for norm in grad[0].reshape(self.R, -1).norm(dim=1)]
        if all(norm == 0 for norm in norms):
            return True, "no gradient reaches the earlier step at all: see the check of detached memory"
        return min(norms) > 0, "gradient norms by head (key, gate): " + ", ".join(f"{norm:.2g}" for norm in norms)

    def detached(self):
        """The gradient of a read crosses the memory into an earlier step's key."""
        state, first, second = self.state(), self.controls(), self.controls()
        key = first[0].clone().requires_grad_()
        _, memory, usage, _ = self.step(*state, key, first[1])
        weights = self.normal(self.B, self.R, self.N).softmax(-1)
        reads = self.step(memory, usage, weights, *second)[0]
        grad = torch.autograd.grad(reads.square().sum(), key, allow_unused=True)[0] if reads.requires_grad else None
        norm = 0.0 if grad is None else float(grad.norm())
        return norm > 0, f"gradient of a read with respect to the key of the step before, through memory: {norm:.2g}"

    def feedback(self, controller):
        """The controller's second input is the reads."""
        reads, _, _, read_weights = reference.lrua_step(*self.state(), *self.controls(), **self.options)
        fed = controller(reads.clone(), read_weights.clone()).flatten(1)
        ok = fed.shape == reads.flatten(1).shape and bool(torch.allclose(fed, reads.flatten(1)))
        return (
            ok,
            f"{fed.shape[1]} numbers are fed back; the reads are {self.R * self.W}, the read weights {self.R * self.N}",
        )
