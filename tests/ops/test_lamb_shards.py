"""LAMB over parameters of which each process has some rows, beside LAMB over whole ones.

The processes are played by one, which makes their steps one after the other: up to the sum over all, then from it on.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import lamb
from ops.lamb import Lamb
from tests.ops.test_lamb import FUSED, IMPLEMENTATIONS, INTERPRETED, device_of, everything

OPTIONS = [{}, {"weight_decay": 0.1}, {"trust_ratio": False, "weight_decay": 0.0}, {"lr": 0.05}]


class Asking(Exception):
    pass


def step_together(processes):
    """A step of all of these optimizers, each a process'."""
    asked = []

    def ask(sums):
        asked.append(sums.clone())
        raise Asking

    for optimizer in processes:
        optimizer.sum_across = ask
        with pytest.raises(Asking):
            optimizer.step()
    total = torch.stack(asked).sum(0)
    assert total.dtype == torch.float64 and total.dim() == 1
    for optimizer in processes:
        optimizer.sum_across = lambda sums: sums.copy_(total)
        optimizer.step()


class Case:
    """Random weights, cut into rows at random places for some processes; the last parameter in slices."""

    def __init__(self, seed, processes, implementation, monkeypatch):
        self.random, self.device = torch.Generator().manual_seed(seed), device_of(implementation)
        slices, rows = self.draw_int(1, 4), 30 if INTERPRETED else 300
        self.shapes = [(self.draw_int(1, rows), *([self.draw_int(1, 9)] * (i % 2))) for i in range(4)]
        self.shapes.append((slices * self.draw_int(1, rows // 2), self.draw_int(1, 7)))
        self.cuts = [
            [0, *sorted(self.draw_int(0, shape[0]) for _ in range(processes - 1)), shape[0]] for shape in self.shapes
        ]
        options = [*OPTIONS, {"trust_ratio_slices": slices}]
        weights = [self.draw(shape) for shape in self.shapes]
        self.whole = [torch.nn.Parameter(w.double()) for w in weights]
        self.expected = self.lamb(self.whole, options, "plain")
        self.parts = [[torch.nn.Parameter(part) for part in self.cut(weights, rank)] for rank in range(processes)]
        self.processes = [self.lamb(parts, options, implementation) for parts in self.parts]
        places = {
            part: (cuts[rank], len(whole))
            for rank, parts in enumerate(self.parts)
            for part, cuts, whole in zip(parts, self.cuts, weights)
        }
        places.update((w, (0, len(w))) for w in self.whole)
        monkeypatch.setattr(lamb, "place_of", places.get)

    def draw_int(self, least, most):
        return int(torch.randint(least, most + 1, (), generator=self.random))

    def draw(self, shape):
        scale = 10.0 ** self.draw_int(-2, 1)
        return (torch.randn(shape, generator=self.random) * scale).to(self.device)

    def cut(self, tensors, rank):
        return [t[cuts[rank] : cuts[rank + 1]].clone() for t, cuts in zip(tensors, self.cuts)]

    def lamb(self, parameters, options, implementation):
        groups = [{"params": [p], **own} for p, own in zip(parameters, options)]
        optimizer = Lamb(groups, lr=0.02, implementation=implementation)
        optimizer.compute_weights.update((p, p.detach().bfloat16()) for p in parameters[::2])
        return optimizer

    def step(self, spoil=None):
        """With new gradients, of which `spoil` may change those of the whole weights first."""
        gradients = [self.draw(shape) for shape in self.shapes]
        if spoil:
            spoil(gradients)
        for p, g in zip(self.whole, gradients):
            p.grad = g.double()
        for rank, parts in enumerate(self.parts):
            for p, g in zip(parts, self.cut(gradients, rank)):
                p.grad = g
        self.expected.step()
        step_together(self.processes)

    def written(self):
        return [everything(parts, optimizer) for parts, optimizer in zip(self.parts, self.processes)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_become_what_the_whole_parameters_become_however_they_are_cut(implementation, monkeypatch):
    @settings(max_examples=2 if INTERPRETED else 25, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 5))
    def check(seed, processes):
        case = Case(seed, processes, implementation, monkeypatch)
        for _ in range(3):
            case.step()
        for number, expected in enumerate(case.whole):
            parts = [parts[number] for parts in case.parts]
            others = [case.processes[rank].state[part] for rank, part in enumerate(parts)]
            pairs = [(parts, expected)]
            pairs += [([o[key] for o in others], case.expected.state[expected][key]) for key in others[0]]
            for mine, its in pairs:
                error = torch.cat(list(mine)).detach().double() - its.detach()
                assert error.norm() <= 1e-6 * its.norm(), (case.shapes, case.cuts, number)
        for optimizer in case.processes:
            assert optimizer.skipped == 0
            for part, rounded in optimizer.compute_weights.items():
                assert torch.equal(rounded, part.bfloat16())

    check()


@pytest.mark.parametrize("implementation", FUSED)
def test_parts_that_are_all_of_it_become_the_same_bits_as_without_a_sum(implementation, monkeypatch):
    def run(sum_across):
        case = Case(seed, 1, implementation, monkeypatch)
        ((optimizer, parts),) = zip(case.processes, case.parts)
        optimizer.sum_across = sum_across
        for _ in range(3):
            for p in parts:
                p.grad = case.draw(p.shape)
            optimizer.step()
        return everything(parts, optimizer)

    seed = int(torch.randint(2**31, ()))
    assert all(map(torch.equal, run(None), run(lambda sums: None))), seed


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_in_one_part_skips_the_update_of_all(implementation, value, monkeypatch):
    case = Case(int(torch.randint(2**31, ())), 3, implementation, monkeypatch)
    case.step()
    before = case.written()
    case.step(lambda gradients: gradients[case.draw_int(0, 4)][-1].fill_(value))
    for old, new, optimizer in zip(before, case.written(), case.processes):
        assert len(old) == len(new) and all(map(torch.equal, old, new)) and optimizer.skipped == 1
    case.step()
    assert not torch.equal(case.written()[-1][0], before[-1][0]) or not len(before[-1][0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_process_without_gradients_skips_what_the_others_skip(implementation):
    parameter = torch.nn.Parameter(torch.ones(3, device=device_of(implementation)))
    optimizer = Lamb([parameter], lr=0.1, implementation=implementation)
    optimizer.sum_across = lambda sums: sums.add_(1)
    optimizer.step()
    assert optimizer.skipped == 1 and parameter not in optimizer.state
