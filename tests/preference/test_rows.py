"""Rows: three layouts score the same tokens in the same contexts; order, hosts, resuming."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxllm.errors import InputError
from jaxllm.preference.records import Belief, Example
from jaxllm.preference.rows import PreferenceBatches, PreferenceRows, RowConfig

CONFIGS = {
    "padded": RowConfig("padded", 4, 14),
    "packed": RowConfig("packed", 4, 14, 5),
    "shared_prompt": RowConfig("shared_prompt", 4, 20),
    "packed shared_prompt": RowConfig("shared_prompt", 4, 24, 2),
}


def make(count=11, **fields):
    """Pairs of 2 to 5 prompt tokens with completions of 1 to 4; all ids differ."""
    rng = np.random.default_rng(0)
    fresh = itertools.count(1)

    def ids(low, high):
        return tuple(itertools.islice(fresh, int(rng.integers(low, high))))

    return [
        Example(ids(2, 6), (ids(1, 5), ids(1, 5)), identity=f"x:{i}", **fields)
        for i in range(count)
    ]


def scored(batch, slots):
    """{(example, slot, place): (visible tokens before, target)} of every owned position."""
    found = {}
    for row, at in zip(*np.nonzero(batch["owner"] >= 0), strict=True):
        before = np.arange(batch["tokens"].shape[1]) <= at
        before &= batch["segment_ids"][row] == batch["segment_ids"][row, at]
        if "branch" in batch:
            branch = batch["branch"][row]
            before &= (branch == 0) | (branch == branch[at])
        np.testing.assert_array_equal(batch["positions"][row, before], np.arange(before.sum()))
        p, slot = divmod(int(batch["owner"][row, at]), slots)
        key = int(batch["example"][p]), slot, int(batch["place"][row, at])
        assert key not in found  # Every token is counted once.
        context = tuple(batch["tokens"][row, before].tolist())
        found[key] = context, int(batch["targets"][row, at])
    return found


def expected(examples):
    return {
        (i, slot, place): ((*e.prompt_ids, *ids[:place]), ids[place])
        for i, e in enumerate(examples)
        for slot, ids in enumerate(e.completion_ids)
        for place in range(len(ids))
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_predicts_every_token_once_from_its_own_prompt(name):
    examples = make()
    rows = PreferenceRows(examples, CONFIGS[name])
    found = {}
    for batch in rows.in_order():
        assert batch["tokens"].shape == (rows.rows, CONFIGS[name].row_length)
        part = scored(batch, rows.slots)
        assert not found.keys() & part.keys()
        found |= part
        padding = batch["segment_ids"] < 0
        assert (batch["owner"][padding] == -1).all() and not batch["tokens"][padding].any()
        assert not batch["targets"][padding].any()
    assert found == expected(examples)


@pytest.mark.parametrize("name", CONFIGS)
def test_prompt_tokens_are_owned_once_per_example(name):
    """Their sum is what ORPO adds to the chosen completion's."""
    examples = make()
    for batch in PreferenceRows(examples, CONFIGS[name]).in_order():
        for p, i in enumerate(batch["example"]):
            mine = batch["prompt_owner"] == p
            wanted = () if i < 0 else examples[i].prompt_ids[1:]
            assert sorted(batch["targets"][mine].tolist()) == sorted(wanted)


def test_packed_rows_hold_more_and_the_last_batch_is_partly_invalid():
    examples = make()
    packed = list(PreferenceRows(examples, CONFIGS["packed"]).in_order())
    assert sum(int(batch["valid"].sum()) for batch in packed) == 11
    assert not packed[-1]["valid"].all() and packed[-1]["example"][-1] == -1
    filled = np.mean([(batch["segment_ids"] >= 0).mean() for batch in packed[:-1]])
    padded = next(PreferenceRows(examples, CONFIGS["padded"]).in_order())
    assert filled > 1.3 * (padded["segment_ids"] >= 0).mean()


def test_padded_rows_by_hand():
    example = Example((7, 8, 9), ((1, 2), (3,)), margin=0.5, identity="x:1")
    batch = PreferenceRows([example], RowConfig("padded", 2, 5)).batch([0])
    assert batch["tokens"].tolist() == [[7, 8, 9, 1, 0], [7, 8, 9, 0, 0], [0] * 5, [0] * 5]
    assert batch["targets"].tolist() == [[8, 9, 1, 2, 0], [8, 9, 3, 0, 0], [0] * 5, [0] * 5]
    assert batch["owner"][:2].tolist() == [[-1, -1, 0, 0, -1], [-1, -1, 1, -1, -1]]
    assert batch["place"][0].tolist() == [0, 0, 0, 1, 0]
    assert batch["valid"].tolist() == [True, False] and batch["margin"].tolist() == [0.5, 0.0]


def test_shared_prompt_by_hand():
    """The prompt's last token begins every branch, at its own position."""
    example = Example((7, 8, 9), ((1, 2), (3,)), identity="x:1")
    batch = PreferenceRows([example], RowConfig("shared_prompt", 1, 6)).batch([0])
    assert batch["tokens"].tolist() == [[7, 8, 9, 1, 9, 0]]
    assert batch["targets"].tolist() == [[8, 9, 1, 2, 3, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 2, 0]]
    assert batch["branch"].tolist() == [[0, 0, 1, 1, 2, 0]]
    assert batch["segment_ids"].tolist() == [[0, 0, 0, 0, 0, -1]]
    assert batch["owner"].tolist() == [[-1, -1, 0, 0, 1, -1]]


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_order_is_the_uninterrupted_one(name):
    examples = make()

    def batches():
        return PreferenceBatches(PreferenceRows(examples, CONFIGS[name]), 4, seed=3)

    stream = batches().iterate()
    wanted = [next(stream) for _ in range(9)]
    stream.close()
    again = batches().iterate(5)
    for batch in wanted[5:]:
        resumed = next(again)
        for key in batch:
            np.testing.assert_array_equal(resumed[key], batch[key])
    again.close()
    # Nothing is dropped and nothing comes twice within an epoch.
    order = [i for batch in wanted for i in batch["example"].tolist() if i >= 0]
    for start in (0, 11):
        assert sorted(order[start : start + 11]) == list(range(11))
    assert order[:11] != order[11:22]
    other = PreferenceBatches(PreferenceRows(examples, CONFIGS[name]), 4, seed=4).batch(0)
    assert other["example"].tolist() != wanted[0]["example"].tolist()


def test_layouts_see_the_same_order():
    examples = make()
    orders = []
    for config in CONFIGS.values():
        batches = PreferenceBatches(PreferenceRows(examples, config), 4, seed=3)
        steps = (batches.batch(step)["example"].tolist() for step in range(6))
        orders.append([i for step in steps for i in step if i >= 0][:11])
    assert orders[0] == orders[1] == orders[2] == orders[3]


@pytest.mark.parametrize("name", ["padded", "packed shared_prompt"])
def test_hosts_read_their_parts_of_the_same_batches(name):
    rows = PreferenceRows(make(), CONFIGS[name])
    whole = PreferenceBatches(rows, 4, seed=1)
    parts = [PreferenceBatches(rows, 4, seed=1, hosts=(host, 2)) for host in range(2)]
    for step in range(4):
        wanted = whole.batch(step)
        halves = [part.batch(step) for part in parts]
        for key, value in wanted.items():
            np.testing.assert_array_equal(np.concatenate([h[key] for h in halves]), value)
    with pytest.raises(InputError, match="5 rows are not a multiple of 2 hosts"):
        PreferenceBatches(PreferenceRows(make(), CONFIGS["packed"]), 4, hosts=(0, 2))
    with pytest.raises(InputError, match="batch size 6 differs from the rows' 4"):
        PreferenceBatches(rows, 6)


@pytest.mark.parametrize("name", CONFIGS)
def test_mismatched_completions_are_another_prompts(name):
    """A prompt and a completion of it may be neighbours in a file, as when pairs are split."""
    examples = [
        Example(e.prompt_ids, (ids,), desirable=slot == 0, identity=e.identity)
        for e in make(5)
        for slot, ids in enumerate(e.completion_ids)
    ]
    rows = PreferenceRows(examples, CONFIGS[name], mismatched=True)
    assert rows.slots == 2 and rows.completions == 1
    given = {}
    for batch in rows.in_order():
        assert batch["desirable"].dtype == bool
        for (i, slot, place), (context, target) in scored(batch, 2).items():
            if slot == 1:
                given.setdefault(i, []).append(target)
                prompt = examples[i].prompt_ids
                assert context == (*prompt, *given[i][:-1]) and place == len(given[i]) - 1
    for i, ids in given.items():
        (owner,) = [e for e in examples if e.completion_ids[0] == tuple(ids)]
        assert owner.prompt_ids != examples[i].prompt_ids
    assert len(given) == 10
    assert len({tuple(ids) for ids in given.values()}) >= 5
    with pytest.raises(InputError, match="at least two prompts"):
        PreferenceRows(examples[:2], CONFIGS[name], mismatched=True)


def test_a_mismatched_completion_is_cut_to_the_room_its_prompt_leaves():
    examples = [Example((1, 2, 3, 4), ((5,),)), Example((6,), ((7, 8, 9, 10),))]
    rows = PreferenceRows(examples, RowConfig("padded", 2, 5), mismatched=True)
    found = scored(rows.batch([0, 1]), 2)
    assert [found[0, 1, place][1] for place in range(2)] == [7, 8] and (0, 1, 2) not in found


@pytest.mark.parametrize("name", CONFIGS)
def test_one_token_beliefs_are_where_the_chosen_completion_begins(name):
    belief = Belief((0, 1), (0.25, 0.75), ((901,), (902,)))
    three = Belief((0, 1), (0.5, 0.25, 0.25), ((901,), (902,), (903,)))
    examples = [
        Example(e.prompt_ids, e.completion_ids, belief=three if i == 2 else belief)
        for i, e in enumerate(make())
    ]
    rows = PreferenceRows(examples, CONFIGS[name])
    assert (rows.beliefs, rows.belief_strings, rows.slots) == (3, False, 2)
    for batch in rows.in_order():
        for p in np.flatnonzero(batch["valid"]):
            i = batch["example"][p]
            place = batch["belief_row"][p], batch["belief_position"][p]
            assert batch["owner"][place] == 2 * p and batch["place"][place] == 0
            assert batch["tokens"][place] == examples[i].prompt_ids[-1]
            size = len(examples[i].belief.ids)
            assert batch["belief_mask"][p].tolist() == [True, True, size == 3]
            assert batch["belief_ids"][p, :size].tolist() == [901, 902, 903][:size]
            np.testing.assert_allclose(batch["belief_target"][p].sum(), 1, rtol=1e-6)
            assert batch["belief_span"][p].tolist() == [0, 1]


@pytest.mark.parametrize("name", CONFIGS)
def test_beliefs_of_several_tokens_are_slots_of_their_own(name):
    belief = Belief((0, 2), (0.5, 0.5), ((901, 902), (903,)))
    examples = [Example((1 + i, 50), ((10, 11, 12), (10, 11)), belief=belief) for i in range(5)]
    config = CONFIGS[name]
    rows = PreferenceRows(examples, config)
    assert (rows.belief_strings, rows.slots, rows.completions) == (True, 4, 2)
    found = {}
    for batch in rows.in_order():
        assert "belief_ids" not in batch and "belief_row" not in batch
        found |= scored(batch, 4)
    for i in range(5):
        assert found[i, 2, 0] == ((1 + i, 50), 901)
        assert found[i, 2, 1] == ((1 + i, 50, 901), 902)
        assert found[i, 3, 0] == ((1 + i, 50), 903) and (i, 3, 1) not in found


@pytest.mark.parametrize("name", CONFIGS)
def test_supervised_answers_are_slots_where_they_are_read(name):
    examples = [
        Example(e.prompt_ids, e.completion_ids, target_ids=(900 + i, 990), identity=e.identity)
        for i, e in enumerate(make(5))
    ]
    assert PreferenceRows(examples, CONFIGS[name]).slots == 2
    config = replace(CONFIGS[name], rows=CONFIGS[name].rows and CONFIGS[name].rows + 1)
    rows, found = PreferenceRows(examples, config, supervised=True), {}
    assert rows.slots == 3
    for batch in rows.in_order():
        found |= scored(batch, 3)
    third = {key: value for key, value in found.items() if key[1] == 2}
    assert len(third) == 10
    for i, example in enumerate(examples):
        assert third[i, 2, 0] == (example.prompt_ids, 900 + i)
        assert third[i, 2, 1] == ((*example.prompt_ids, 900 + i), 990)
    with pytest.raises(InputError, match="x:0: the algorithm reads `target`, which is missing"):
        PreferenceRows(make(5), config, supervised=True)


def test_density_ratios_go_with_their_examples():
    given = [Example((1, 2), ((3,),), desirable=False, density_ratio=float(n)) for n in (2, 5)]
    batch = PreferenceRows(given, RowConfig("padded", 3, 4)).batch([1, 0])
    assert batch["density_ratio"].tolist() == [5, 2, 0]


def test_lists_may_be_of_different_lengths():
    examples = [
        Example((1, 2), ((3,), (4,), (5,)), scores=(1.0, 2.0, 3.0)),
        Example((6, 7), ((8,), (9,)), scores=(4.0, 5.0)),
    ]
    rows = PreferenceRows(examples, RowConfig("padded", 2, 4))
    batch = rows.batch([0, 1])
    assert batch["scores"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert set(batch["owner"][batch["owner"] >= 0].tolist()) == {0, 1, 2, 3, 4}


def test_columns_go_with_their_examples():
    examples = make()
    logps = np.arange(22, dtype=np.float32).reshape(11, 2)
    rows = PreferenceRows(examples, CONFIGS["packed"], columns={"ref_logps": logps})
    for batch in rows.in_order():
        real = batch["valid"]
        np.testing.assert_array_equal(batch["ref_logps"][real], logps[batch["example"][real]])
        assert batch["ref_logps"].shape == (4, 2) and not batch["ref_logps"][~real].any()
    with pytest.raises(InputError, match="ref_logps has 10 entries for 11 examples"):
        PreferenceRows(examples, CONFIGS["packed"], columns={"ref_logps": logps[1:]})


def test_what_cannot_be_laid_out_is_refused():
    long = Example((1,) * 6, ((2,) * 8, (3,)), identity="x:9")
    wide = RowConfig("shared_prompt", 2, 13)
    for config, length in ((RowConfig("padded", 2, 12), 13), (wide, 14)):
        with pytest.raises(InputError, match=f"x:9: needs a row of {length} tokens"):
            PreferenceRows([long], config)
    with pytest.raises(InputError, match="data.rows is None with layout packed"):
        RowConfig("packed")
    with pytest.raises(InputError, match="data.rows is 3 with layout padded, expected none"):
        RowConfig("padded", rows=3)
    with pytest.raises(InputError, match="data.row_length 0 must be at least 1"):
        RowConfig(row_length=0)
    with pytest.raises(InputError, match="data.rows 1 cannot hold the 2"):
        PreferenceRows(make(), RowConfig("packed", 4, 14, 1))
    with pytest.raises(InputError, match="x:3: some examples have `margin`, others do not"):
        PreferenceRows([*make(2), Example((1,), ((2,), (3,)), margin=1.0, identity="x:3")], wide)
    with pytest.raises(InputError, match="x:3: 1 completions, others have 2"):
        PreferenceRows([*make(2), Example((1,), ((2,),), identity="x:3")], wide)
    with pytest.raises(InputError, match="x:3: an empty prompt or response"):
        PreferenceRows([Example((), ((2,), (3,)), identity="x:3")], wide)
    with pytest.raises(InputError, match="there are no preference examples"):
        PreferenceRows([], wide)
    with pytest.raises(InputError, match="4 examples do not fit into 2 rows"):
        PreferenceRows(make(), RowConfig("packed", 4, 9, 2)).batch([0, 1, 2, 3])
