import numpy as np
import pytest
import torch

from chgval.errors import FactorError
from chgval.valuation.accumulator import ValueAccumulator
from tests import oracles

N, C, D = 37, 4, 6


class Run:
    """Three epochs of random logits and features, and what a plain reading of them says."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.labels_N = rng.integers(C, size=N)
        self.logits = rng.normal(scale=3, size=(3, N, C))
        self.features = rng.exponential(size=(3, N, D))

    def accumulate(self, rows=slice(None), batch=5, epochs=(0, 1, 2), order_seed=0, **settings):
        """Feed the run in shuffled batches; return the accumulator and the signals of each epoch."""
        accumulator = ValueAccumulator(torch.tensor(self.labels_N), C, D, **settings)
        rng = np.random.default_rng(order_seed)
        signals = []
        for epoch in epochs:
            order = rng.permutation(np.arange(N)[rows])
            for indices in np.array_split(order, -(-len(order) // batch)):
                accumulator.update(
                    torch.tensor(indices),
                    torch.tensor(self.logits[epoch, indices]),
                    torch.tensor(self.features[epoch, indices]),
                )
            signals.append(accumulator.finish_epoch())
        return accumulator, signals

    def gradients(self, epoch, *, times_loss, rows=slice(None)):
        """Per-sample gradients of a layer that gives these logits: the residual times (h, 1), by autograd."""
        grads = []
        for logits, feature, label in zip(
            self.logits[epoch][rows], self.features[epoch][rows], self.labels_N[rows], strict=True
        ):
            z = torch.tensor(logits, requires_grad=True)
            loss = torch.nn.functional.cross_entropy(z[None], torch.tensor([label]))
            (residual,) = torch.autograd.grad(loss, z)
            scale = loss.item() if times_loss else 1.0
            grads.append(scale * np.outer(residual.numpy(), np.append(feature, 1)).ravel())
        return np.array(grads)


@pytest.mark.parametrize(("utility", "times_loss"), [("chg", True), ("gradient", False)])
def test_values_are_theorem_1_of_the_epochs_gradients(utility, times_loss):
    run = Run()
    accumulator, signals = run.accumulate(utility=utility)
    expected = []
    for epoch in range(3):
        x_ND = run.gradients(epoch, times_loss=times_loss)
        expected.append(oracles.theorem_1(x_ND, x_ND.mean(0)))
        np.testing.assert_allclose(signals[epoch].value_N, expected[-1], rtol=2e-5, atol=1e-6)
    total = accumulator.run_signals()
    np.testing.assert_allclose(total.value_N, np.mean(expected, 0), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(total.value_std_N, np.std(expected, 0, ddof=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total.value_stderr_N, total.value_std_N / np.sqrt(3), rtol=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
def test_hardness_values_come_from_the_losses(per_class):
    run = Run()
    _, signals = run.accumulate(utility="hardness", per_class=per_class)
    log_p = run.logits[0] - np.log(np.exp(run.logits[0]).sum(1, keepdims=True))
    losses_N = -log_p[np.arange(N), run.labels_N]
    groups = [run.labels_N == c for c in range(C)] if per_class else [np.full(N, True)]
    for group in groups:
        members, n = losses_N[group], group.sum()
        h1 = (1 / np.arange(1, n + 1)).sum()
        expected = (h1 - 1 / n) / (n - 1) * members - (h1 - 1) / (n * (n - 1)) * members.sum()
        np.testing.assert_allclose(signals[0].value_N[group], expected, rtol=1e-4, atol=1e-6)


def test_values_per_class_are_theorem_1_within_each_class():
    run = Run()
    _, signals = run.accumulate(per_class=True)
    for label in range(C):
        rows = run.labels_N == label
        x_ND = run.gradients(1, times_loss=True, rows=rows)
        expected = oracles.theorem_1(x_ND, x_ND.mean(0))
        np.testing.assert_allclose(signals[1].value_N[rows], expected, rtol=5e-5, atol=1e-5)


def test_signals_equal_their_definitions():
    run = Run(seed=4)
    accumulator, signals = run.accumulate()
    p = np.exp(run.logits) / np.exp(run.logits).sum(2, keepdims=True)
    onehot = np.eye(C)[run.labels_N]
    given = (p * onehot).sum(2)
    margin = (run.logits * onehot).sum(2) - np.where(onehot == 1, -np.inf, run.logits).max(2)
    el2n = np.linalg.norm(p - onehot, axis=2)
    predicted = run.logits.argmax(2)
    right = predicted == run.labels_N
    for epoch in range(3):
        np.testing.assert_allclose(
            signals[epoch].signals["loss"], -np.log(given[epoch]), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(signals[epoch].signals["margin"], margin[epoch], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(signals[epoch].signals["el2n"], el2n[epoch], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(signals[epoch].signals["label_probability"], given[epoch], rtol=1e-5)
        np.testing.assert_array_equal(signals[epoch].predicted_label_N, predicted[epoch])
    total = accumulator.run_signals()
    np.testing.assert_allclose(total.means["margin"], margin.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total.means["el2n"], el2n.mean(0), rtol=1e-4)
    np.testing.assert_allclose(total.means["loss"], -np.log(given).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(total.predicted_label_N, p.mean(0).argmax(1))
    np.testing.assert_allclose(total.predicted_probability_N, p.mean(0).max(1), rtol=1e-5)
    forgotten = (right[0] & ~right[1]).astype(int) + (right[1] & ~right[2])
    assert forgotten.sum() > 0
    np.testing.assert_array_equal(total.forgetting_events_N, forgotten)


def test_values_do_not_depend_on_batches_or_their_order():
    run = Run()
    first, _ = run.accumulate(batch=5, order_seed=0)
    second, _ = run.accumulate(batch=N, order_seed=1)
    np.testing.assert_array_equal(first.run_signals().value_N, second.run_signals().value_N)


def test_samples_that_an_epoch_does_not_see_are_not_players():
    run = Run()
    rows = np.arange(N) % 5 != 0
    for per_class in (False, True):
        accumulator, signals = run.accumulate(rows=rows, per_class=per_class)
        unseen = ~rows
        assert (
            np.isnan(signals[0].value_N[unseen]).all() and (signals[0].predicted_label_N[unseen] == -1).all()
        )
        total = accumulator.run_signals()
        assert np.isnan(total.value_N[unseen]).all() and (total.num_epochs_N == 3 * rows).all()
    _, signals = run.accumulate(rows=rows)
    x_ND = run.gradients(0, times_loss=True, rows=rows)
    np.testing.assert_allclose(
        signals[0].value_N[rows], oracles.theorem_1(x_ND, x_ND.mean(0)), rtol=5e-5, atol=1e-6
    )


def test_a_sample_missed_by_one_epoch_averages_over_the_others():
    run = Run()
    accumulator = ValueAccumulator(torch.tensor(run.labels_N), C, D)
    expected = np.zeros(2)
    for epoch, rows in enumerate([np.arange(N), np.arange(1, N), np.arange(N)]):
        accumulator.update(
            torch.tensor(rows), torch.tensor(run.logits[epoch, rows]), torch.tensor(run.features[epoch, rows])
        )
        expected += np.nan_to_num(accumulator.finish_epoch().value_N[:2])
    total = accumulator.run_signals()
    np.testing.assert_allclose(total.value_N[:2], expected / [2, 3], rtol=1e-12)
    assert total.num_epochs_N[:2].tolist() == [2, 3]


def test_shards_exchange_only_their_sums():
    run = Run()
    whole, _ = run.accumulate(epochs=(0,))
    shards = []
    for rows in (np.arange(10), np.arange(10, N)):
        shard = ValueAccumulator(torch.tensor(run.labels_N[rows]), C, D)
        shard.update(
            torch.arange(len(rows)), torch.tensor(run.logits[0, rows]), torch.tensor(run.features[0, rows])
        )
        shards.append(shard)
    sums = shards[0].epoch_sums() + shards[1].epoch_sums()
    values = np.concatenate([shard.finish_epoch(sums).value_N for shard in shards])
    np.testing.assert_allclose(values, whole.run_signals().value_N, rtol=1e-6, atol=1e-9)


def test_sums_are_refused_where_the_game_is_not_played_on_them():
    run = Run()
    accumulator, _ = run.accumulate(per_class=True)
    with pytest.raises(FactorError, match="not per-class or hardness"):
        accumulator.finish_epoch(ValueAccumulator(torch.tensor(run.labels_N), C, D).epoch_sums())


def test_an_epoch_that_saw_nothing_is_an_error():
    with pytest.raises(FactorError, match="no samples"):
        ValueAccumulator(torch.zeros(3, dtype=torch.int64), C, D).finish_epoch()
