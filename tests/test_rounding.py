"""Stochastic rounding of states: right on average, and the same bits wherever and whenever it is done.

Everything here is determined by seeds. Where a test is statistical, its limit says how often it would fail
if the hash were true randomness: once in a million.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

import numba_opt
from numba_opt.compiler import rounding
from numba_opt.cpu import loops as cpu

from . import table
from .test_state_dtype import DTYPES, assert_same, own, wide

ALARM = 1e-6
N = 1 << 18

each_half = pytest.mark.parametrize("choice", ["bfloat16", "float16"])
few = pytest.mark.parametrize(
    ("name", "choice"),
    [("nag", "float16"), ("rmsprop-centered", "bfloat16"), ("groupadagrad", "float16"), ("ftml", "bfloat16")],
)
fused_or_not = pytest.mark.parametrize("fused", [True, False])


def stored(values, choice, fused=True, steps=1, index=0, **options):
    """Numbers as they are stored: NAG's first momentum is the gradient's negative."""
    options = {"momentum": 1, "state_dtype": choice, "stochastic_rounding": True, **options}
    optimizer = numba_opt.NAG(1.0, use_fused_step=fused, begin_num_update=steps - 1, **options)
    weight, grad = np.zeros_like(values), -values
    state = optimizer.create_state(index, weight)
    optimizer.update([index], [weight], [grad], [state])
    return state


def neighbours(choice):
    """All finite numbers of a dtype, in order, from 0 on."""
    found = np.arange(0x8000, dtype=np.uint16).view(DTYPES[choice]).astype(np.float32)
    return found[np.isfinite(found)]


# ---------------------------------------------------------------- which numbers come out


@each_half
@fused_or_not
def test_what_can_be_stored_stays(choice, fused):
    """Each of the 65,536 patterns, NaN for NaN."""
    values = np.arange(0x10000, dtype=np.uint32).astype(np.uint16).view(DTYPES[choice]).astype(np.float32)
    expected = np.where(values == 0, np.float32(0), values)  # the momentum is 0 - grad
    for seed in range(3):
        table.assert_bits(wide(stored(values, choice, fused, seed=seed)), [expected])


@each_half
@fused_or_not
def test_one_of_the_two_neighbours(choice, fused):
    """Between all numbers and the next ones; both are met."""
    low = neighbours(choice)
    values = (low[:-1] + np.diff(low) / 2).astype(np.float32)
    values = np.concatenate([values, -values])
    found = np.array([wide(stored(values, choice, fused, seed=seed))[0] for seed in range(16)])
    both = np.concatenate([np.stack([low[:-1], low[1:]]), -np.stack([low[:-1], low[1:]])], axis=1)
    assert ((found == both[0]) | (found == both[1])).all()
    chances = (found == both[0]).sum(axis=0)  # of 16 fair coins
    assert ((chances > 0) & (chances < 16)).mean() > 0.999
    assert abs(chances.mean() - 8) < 6 * 2 / math.sqrt(len(values))


@each_half
@fused_or_not
def test_beyond_the_largest_to_nearest(choice, fused):
    largest = neighbours(choice)[-1]
    step = largest - neighbours(choice)[-2]
    values = np.repeat(
        np.float32([largest + step / 4, largest + step * 0.75, math.inf, np.finfo(np.float32).max]), 64
    )
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(DTYPES[choice])
    assert_same([stored(values, choice, fused)], [expected])


@each_half
def test_nan_stays_nan(choice):
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001, 0x7FC00000], np.uint32)
    for seed in range(20):
        found = rounding.rounded(patterns.view(np.float32), DTYPES[choice], np.arange(5), seed, 0)
        assert np.isnan(found.astype(np.float32)).all()
        assert np.signbit(found).tolist() == [False, False, True, True, False]


# ---------------------------------------------------------------- by chance


@each_half
@fused_or_not
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-6])
def test_unbiased(choice, fused, scale):
    """How often each of 64 numbers goes up, by a chi-square test."""
    values = (np.random.default_rng(3).uniform(0.5, 1, 64) * scale).astype(np.float32)
    grid = neighbours(choice).astype(np.float64)
    low = grid[np.searchsorted(grid, values, "right") - 1]
    high = grid[np.searchsorted(grid, values, "right")]
    chance = (values - low) / (high - low)
    assert (chance > 0).sum() > 50
    draws = N // 64
    found = wide(stored(np.tile(values, (draws, 1)), choice, fused))[0]
    assert ((found == low.astype("f4")) | (found == high.astype("f4"))).all()
    ups = (found > values).sum(axis=0)
    some = (chance * draws > 10) & ((1 - chance) * draws > 10)
    z = (ups - draws * chance)[some] / np.sqrt(draws * chance * (1 - chance))[some]
    assert (z**2).sum() < stats.chi2.isf(ALARM, some.sum())
    assert abs(z.sum()) / math.sqrt(len(z)) < stats.norm.isf(ALARM / 2)


def draws(choice="bfloat16", size=N, **options):
    """Fair coins: numbers halfway between two that can be stored; 1 is up, -1 down."""
    halfway = (
        np.float32(1) + np.float32(neighbours(choice)[0x3F81] - 1 if choice == "bfloat16" else 2**-10) / 2
    )
    found = wide(stored(np.full(size, halfway, np.float32), choice, **options))[0]
    return np.where(found > halfway, 1.0, -1.0)


@each_half
def test_independent(choice):
    """Of the neighbours, and of what other steps, seeds and parameters get."""
    first = draws(choice)
    limit = stats.norm.isf(ALARM / 2 / 70)
    for lag in [*range(1, 65), 128, 16384]:
        assert abs((first[lag:] * first[:-lag]).sum()) / math.sqrt(N - lag) < limit
    for other in ({"steps": 2}, {"seed": 1}, {"index": 1}, {"index": "0"}):
        assert abs((first * draws(choice, **other)).sum()) / math.sqrt(N) < limit


@fused_or_not
def test_states_are_independent(fused):
    """Adamax's mean and FTML's z would otherwise go up together."""
    optimizer = numba_opt.FTML(
        0.1, state_dtype="bfloat16", stochastic_rounding=True, use_fused_step=fused, beta1=0.5, beta2=0.5
    )
    weight, grad = np.zeros(N, np.float32), np.full(N, 1 + 3 / 512, np.float32)
    state = optimizer.create_state(0, weight)
    optimizer.update([0], [weight], [grad], [state])
    coins = [a.astype("f4") for a in state]
    coins = [np.where(a > a.mean(), 1.0, -1.0) for a in coins]
    coins = [a - a.mean() for a in coins]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert min(coins[a].std(), coins[b].std()) > 0.1
        z = (coins[a] * coins[b]).sum() / math.sqrt(N) / coins[a].std() / coins[b].std()
        assert abs(z) < stats.norm.isf(ALARM / 6)


def test_hash_is_even():
    """Each of the 32 bits is set half of the time, and each bit of the number changes each of them."""
    with np.errstate(over="ignore"):
        found = rounding.random_bits(np.arange(N), 12345)
        limit = stats.norm.isf(ALARM / 2 / 32 / 19) * math.sqrt(N) / 2
        for bit in range(32):
            assert abs(((found >> bit) & 1).sum() - N / 2) < limit
        for flipped in range(18):
            changed = found ^ rounding.random_bits(np.arange(N) ^ (1 << flipped), 12345)
            for bit in range(32):  # pairs count twice: the deviation is larger by the root of 2
                assert abs(((changed >> bit) & 1).sum() - N / 2) < limit * math.sqrt(2)


@each_half
def test_small_changes_are_not_lost(choice):
    """A running mean moves by less than its last bit: to nearest it stays where it is."""
    means = {}
    for chance in (False, True):
        optimizer = numba_opt.RMSProp(0.0, rho=0.9999, state_dtype=choice, stochastic_rounding=chance)
        weight, grad = np.zeros(20_000, np.float32), np.full(20_000, math.sqrt(2), np.float32)
        state = optimizer.create_state(0, weight)
        state[...] = 1
        for _ in range(300):
            optimizer.update([0], [weight], [grad], [state])
        means[chance] = state.astype(np.float64).mean()
    assert means[False] == 1
    right = 2 - 0.9999**300
    last = {"bfloat16": 2**-7, "float16": 2**-10}[choice]
    deviation = last * math.sqrt(300) / 2 / math.sqrt(20_000)  # at most: each step adds a variance of 1/4
    assert abs(means[True] - right) < stats.norm.isf(ALARM / 2) * deviation


# ---------------------------------------------------------------- the same bits


def make(row, choice, shapes=((50, 6), (7, 3)), **options):
    options = {"stochastic_rounding": True, "seed": 5, **table.common(row), **options}
    call = table.make(row, list(shapes))
    optimizer = table.build(row, state_dtype=choice, **options)
    states = [optimizer.create_state_multi_precision(t, w) for t, w in enumerate(call.weights)]
    rng = np.random.default_rng(6)
    for state in states:
        for array in own(state[0] if options.get("sparse_update") == "exact" else state, optimizer):
            array[...] = rng.random(array.shape)
    return optimizer, call._replace(states=states)


@few
def test_step_and_fused_step(name, choice):
    row = table.row(name)
    runs = [make(row, choice, use_fused_step=fused) for fused in (True, False)]
    for _ in range(4):
        for optimizer, call in runs:
            optimizer.update(*call)
    found, expected = (table.outputs(call) for _, call in runs)
    if row.cls.per_row:  # the sum's order shows in float32's last bits
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(*wide([a, b]), rtol=2**-9 if a.dtype.itemsize == 2 else 1e-3)
    else:
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@fused_or_not
@pytest.mark.filterwarnings("ignore:weights in ")
def test_other_weights(dtype, fused):
    """float64 weights, and half-precision ones with a float32 copy, round what float32 ones do."""
    row = table.row("adamax")
    found = []
    for kind in ("float32", dtype):
        weights = [np.full((300, 7), 0.5, DTYPES[kind])]
        optimizer = numba_opt.Adamax(
            beta1=0.5,
            state_dtype="bfloat16",
            stochastic_rounding=True,
            multi_precision=True,
            use_fused_step=fused,
        )
        state = optimizer.create_state_multi_precision(0, weights[0])
        optimizer.update_multi_precision([0], weights, [np.full((300, 7), 2 + 2**-7, DTYPES[kind])], [state])
        found.append(own(state, optimizer)[0])
    assert row.states == 2
    assert len(np.unique(wide(found)[0])) == 2
    assert_same(found[:1], found[1:])


@few
def test_many_tensors_and_one(name, choice):
    """In any order, alone or together, by index and not by place."""
    row = table.row(name)
    optimizer, call = make(row, choice)
    single, alone = make(row, choice)
    for _ in range(3):
        optimizer.update(*call)
        for t in (1, 0):
            single.update(*([column[t]] for column in alone))
    assert_same(table.outputs(call), table.outputs(alone))
    other, moved = make(row, choice)
    for _ in range(3):
        other.update([7, 1], *moved[1:])
    assert_same([moved.weights[1], moved.states[1]], [call.weights[1], call.states[1]])
    with pytest.raises(AssertionError):
        assert_same([moved.states[0]], [call.states[0]])


@fused_or_not
@pytest.mark.parametrize(
    ("name", "choice", "form"),
    [
        ("rmsprop-centered", "bfloat16", "rows"),
        ("groupadagrad", "float16", "rows"),
        ("nag", "float16", "duplicates"),
        ("nag", "float16", "csr"),
    ],
)
def test_sparse_rows_as_the_same_rows_dense(name, choice, fused, form):
    row = table.row(name)
    (dense, whole), (lazy, call) = (make(row, choice, [(50, 6)], use_fused_step=fused) for _ in range(2))
    rows = np.array([3, 4, 17, 49])
    values = np.random.default_rng(1).standard_normal((4, 6)).astype("f4")
    grad = numba_opt.RowSparse(rows, values, (50, 6))
    if form == "duplicates":
        grad = numba_opt.RowSparse(np.append(rows, 3), np.vstack([values, values[:1]]), (50, 6))
    if form == "csr":
        from scipy import sparse

        grad = sparse.csr_array(grad.to_dense())
    full = grad.toarray() if form == "csr" else grad.to_dense()
    for _ in range(2):
        dense.update([0], whole.weights, [full], whole.states)
        lazy.update([0], call.weights, [grad], call.states)
        assert_same([a[rows] for a in table.outputs(call)], [a[rows] for a in table.outputs(whole)])


@pytest.mark.parametrize(("name", "choice"), [("groupadagrad", "float16"), ("adamax", "bfloat16")])
@fused_or_not
def test_exact_rows_catch_up_by_the_same_chance(name, choice, fused):
    row = table.row(name)
    runs = [make(row, choice, [(20, 6)], use_fused_step=fused, sparse_update=m) for m in ("dense", "exact")]
    rng = np.random.default_rng(2)
    for _ in range(7):
        grad = numba_opt.RowSparse(
            np.sort(rng.permutation(20)[:3]), rng.standard_normal((3, 6)).astype("f4"), (20, 6)
        )
        for optimizer, call in runs:
            optimizer.update([0], call.weights, [grad], call.states)
    optimizer, call = runs[1]
    optimizer.flush([0], call.weights, call.states)
    assert_same([call.weights, call.states[0][0]], table.outputs(runs[0][1]))


@few
def test_any_number_of_threads(name, choice, monkeypatch):
    """Tensors that are cut into chunks, in other places if there are others before them."""
    row = table.row(name)
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr("numba_opt.cpu.threads.count", lambda n=count: n)
        optimizer, call = make(row, choice, [(700, 450), (1, 1), (33, 7)])
        for _ in range(2):
            optimizer.update(*call)
        found.append(table.outputs(call))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])
    monkeypatch.setattr("numba_opt.cpu.threads.count", lambda: 2)
    optimizer, call = make(row, choice, [(700, 450), (1, 1), (33, 7)])
    for _ in range(2):
        optimizer.update([2, 1, 0], *(column[::-1] for column in call[1:]))
    assert_same(table.outputs(call), found[0])


@few
def test_trainer_and_resume(name, choice, tmp_path):
    """A trainer does what `update` does, and goes on from a file as if nothing had happened."""
    row = table.row(name)
    optimizer, call = make(row, choice)
    options = {"state_dtype": choice, "stochastic_rounding": True, **table.common(row)}

    def trainer(seed):
        start = make(row, choice)[1]
        made = numba_opt.Trainer(start.weights, table.build(row, seed=seed, **options))
        for mine, given in zip(
            table.leaves([*made.states.values()]), table.leaves(start.states), strict=True
        ):
            mine[...] = given
        return made

    first, second = trainer(5), trainer(6)
    for n in range(4):
        optimizer.update(*call)
        if n == 2:
            first.save(tmp_path / "state")
            second.load(tmp_path / "state")
            assert second.optimizer.seed == 5
        (second if n > 1 else first).step(call.grads)
        if n > 1:
            first.step(call.grads)
    for found in (first, second):
        assert_same([*found.params.values(), *found.states.values()], table.outputs(call))


def test_a_trainer_takes_chance_over_from_a_file():
    """It had none before; its bindings are made anew."""
    weights = [np.ones((30, 8), np.float32)]
    grads = [np.full((30, 8), 1 / 3, np.float32)]
    chance = numba_opt.Trainer(
        [w.copy() for w in weights], "nag", state_dtype="bfloat16", stochastic_rounding=True
    )
    plain = numba_opt.Trainer([w.copy() for w in weights], "nag", state_dtype="bfloat16")
    for trainer in (chance, plain):
        trainer.step(grads)
    plain.load_state_dict(chance.state_dict())
    for trainer in (chance, plain):
        trainer.step(grads)
    assert_same([*plain.states.values()], [*chance.states.values()])
    assert len(np.unique(wide([*plain.states.values()])[0])) > 1


def test_the_numbers_of_parameters_and_steps_are_for_ever():
    """Checkpoints depend on them."""
    assert rounding.tensor_number(0) == EXPECTED[0]
    assert rounding.tensor_number("weight") == EXPECTED[1]
    assert rounding.step_numbers(0, 1) == EXPECTED[2]
    with np.errstate(over="ignore"):
        assert rounding.random_bits(np.arange(3), rounding.key_of(3, 4, 5)).tolist() == EXPECTED[3]
    nag = numba_opt.NAG(state_dtype="float16", stochastic_rounding=True)
    assert nag.tensor_ids([7, np.int64(7), True, "7"])[:2] == nag.tensor_ids([7, 7])


EXPECTED = [2241141297, 2529705682, (38435.0, 27287.0), [3072198929, 1420958552, 4118628811]]


def test_nothing_is_compiled_anew():
    """Not for another seed, step or learning rate."""
    weight = np.ones(100, np.float32)

    def train(seed):
        optimizer = numba_opt.NAG(
            0.1 * (1 + seed), state_dtype="float16", stochastic_rounding=True, seed=seed
        )
        state = optimizer.create_state(0, weight)
        for _ in range(3):
            optimizer.update([0], [weight], [weight / 3], [state])
        return state

    first = train(0)
    before = cpu.dense.cache_info().misses
    assert train(1).tolist() != first.tolist()
    assert train(0).tolist() != first.tolist()  # the weight has moved on
    assert cpu.dense.cache_info().misses == before


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("choice", [None, "float32"])
def test_needs_states_in_half_precision(choice):
    words = "stochastic_rounding needs state_dtype='bfloat16' or 'float16', got state_dtype="
    with pytest.raises(ValueError, match=words):
        numba_opt.NAG(state_dtype=choice, stochastic_rounding=True)


@pytest.mark.parametrize(
    ("seed", "kind"),
    [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (None, TypeError), (True, TypeError)],
)
def test_seed(seed, kind):
    with pytest.raises(kind, match="seed must be an integer >= 0, got "):
        numba_opt.NAG(seed=seed)
