"""ListOps against an independent recursive generator, evaluator and writer."""

import random
import statistics

import numpy as np
import pytest
from tiny_data import from_sequences

from skyformer_jax import tasks
from skyformer_jax.data import listops, store
from skyformer_jax.errors import UserError

SMALL = listops.Grammar(min_length=4, max_length=40, max_depth=4, max_args=4)
SYMBOL = dict(enumerate(listops.SYMBOLS, start=1))
FUNCTIONS = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda args: int(statistics.median(args)),
    "[SM": lambda args: sum(args) % 10,
}


def recursive_tree(rng, grammar, depth=1):
    """Draws a digit or (operator, arguments), node by node as the benchmark describes it."""
    if depth == grammar.max_depth or rng.random() >= 0.25:
        return rng.randrange(10)
    operator = rng.choice(sorted(FUNCTIONS))
    count = rng.randint(2, grammar.max_args)
    return operator, [recursive_tree(rng, grammar, depth + 1) for _ in range(count)]


def length(tree):
    return 1 if isinstance(tree, int) else 2 + sum(map(length, tree[1]))


def value(tree):
    return tree if isinstance(tree, int) else FUNCTIONS[tree[0]](list(map(value, tree[1])))


def text(tree):
    """The tree in the published format, such as ( ( ( [MIN 3 ) 4 ) ] )."""
    if isinstance(tree, int):
        return str(tree)
    inner = tree[0]
    for argument in tree[1]:
        inner = f"( {inner} {text(argument)} )"
    return f"( {inner} ] )"


def parse(tokens):
    """Parses token ids into a tree with a stack."""
    stack = [[]]
    for symbol in (SYMBOL[int(token)] for token in tokens):
        if symbol == "]":
            operator, *arguments = stack.pop()
            stack[-1].append((operator, arguments))
        elif symbol in FUNCTIONS:
            stack.append([symbol])
        else:
            stack[-1].append(int(symbol))
    ((tree,),) = stack
    return tree


@pytest.fixture(scope="module")
def benchmark_trees():
    return listops.generate(8000, seed=1)


def test_labels_are_the_values(benchmark_trees):
    sequences, labels = benchmark_trees
    for sequence, label in zip(sequences[:300], labels[:300], strict=True):
        tree = parse(sequence)
        assert value(tree) == label
        assert length(tree) == len(sequence)
        assert 500 < len(sequence) < 2000


def test_distribution_is_the_benchmarks(benchmark_trees):
    """Compares with a node-by-node recursive generator of the same grammar.

    It accepted 8.33 % of its trees. The 12,000 accepted ones have mean length 1040, median 956,
    standard deviation 397 and 90th percentile 1654. Labels are as published: 17 % each for 0 and
    9, and 7.4 to 9.2 % for each of the others.
    """
    sequences, labels = benchmark_trees
    lengths = np.array([len(s) for s in sequences])
    # Between 8,000 and 12,000 trees the difference has a standard deviation of 5.7 for the mean,
    # and of at most 9 and 13 for median and percentile. The bounds are 3.5 of these.
    assert abs(lengths.mean() - 1040) < 20
    assert abs(np.median(lengths) - 956) < 31
    assert abs(np.percentile(lengths, 90) - 1654) < 46
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert np.all(np.abs(shares[[0, 9]] - 0.17) < 0.015)
    assert np.all((shares[1:9] > 0.065) & (shares[1:9] < 0.1))
    kept = sum(len(listops.draw_chunk(listops.Grammar(), 2, i)[0]) for i in range(4))
    assert abs(kept / (4 * 16384) - 0.083) < 0.004


def test_distribution_is_the_recursive_generators():
    rng = random.Random(3)
    reference = []
    while len(reference) < 4000:
        tree = recursive_tree(rng, SMALL)
        if SMALL.min_length < length(tree) < SMALL.max_length:
            reference.append((length(tree), value(tree)))
    sequences, labels = listops.draw_chunk(SMALL, 0, 0)
    ours = list(zip(map(len, sequences), labels, strict=True))[:4000]
    assert len(ours) > 2500
    for column, edges in ((0, [4, 7, 9, 12, 15, 19, 25, 40]), (1, np.arange(11) - 0.5)):
        a, b = (np.histogram([row[column] for row in rows], edges)[0] for rows in (ours, reference))
        expected = (a + b) * len(ours) / (len(ours) + len(reference))
        chi2 = ((a - expected) ** 2 / expected).sum() * (1 + len(ours) / len(reference))
        assert chi2 < 30  # 99.9th percentile at 9 degrees of freedom is 27.9


def test_seeded_distinct_and_a_prefix():
    few, few_labels = listops.generate(500, seed=4, grammar=SMALL)
    many, many_labels = listops.generate(900, seed=4, grammar=SMALL)
    assert all(np.array_equal(a, b) for a, b in zip(few, many[:500], strict=True))
    np.testing.assert_array_equal(few_labels, many_labels[:500])
    assert len({s.tobytes() for s in many}) == 900
    other, _ = listops.generate(500, seed=5, grammar=SMALL)
    assert not all(np.array_equal(a, b) for a, b in zip(few, other, strict=True))


def test_too_few_trees_is_said():
    tiny = listops.Grammar(min_length=3, max_length=5, max_depth=2, max_args=2)
    with pytest.raises(UserError, match="400 distinct"):  # 4 operators, 10 x 10 digits
        listops.generate(401, grammar=tiny)
    assert len(listops.generate(400, grammar=tiny)[0]) == 400


def write_tsv(path, trees):
    rows = [f"{text(tree)}\t{value(tree)}\n" for tree in trees]
    path.write_text("Source\tTarget\n" + "".join(rows))


def some_trees(seed, count):
    rng = random.Random(seed)
    trees = (recursive_tree(rng, SMALL) for _ in range(100 * count))
    return [tree for tree in trees if not isinstance(tree, int)][:count]


def test_reads_the_published_format(tmp_path):
    trees = some_trees(0, 50)
    write_tsv(tmp_path / "basic_test.tsv", trees)
    sequences, labels = listops.read_tsv(tmp_path / "basic_test.tsv")
    assert [parse(s) for s in sequences] == trees
    assert list(labels) == [value(tree) for tree in trees]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("( ( ( [MIN 3 ) 4 ) ] )", "expected 2"),
        ("( ( ( [MIN 3 ) 4 ) ] )\t3\t4", "expected 2 columns, got 3"),
        ("( ( ( [AVG 3 ) 4 ) ] )\t3", "unknown symbol"),
        ("( ( ( [MIN 3 ) 4 ) ] )\tthree", "three"),
        ("( ( ( [MIN 3 ) 4 ) ] )\t10", "not a digit"),
        ("( ( ( [MIN 3 ) 4 ) ] )\t\u0663", "not a digit"),
        ("( ( ( [MIN 3 ) 4 ) ] )\t0_3", "not a digit"),
        ("( ( ( [MIN 3 ) 4 ) ] )\t", "not a digit"),
        ("( ( ( [MIN 3 ) 4 )\t3", "brackets"),
        ("3 ] [MIN\t3", "brackets"),
        ("[MIN 3 ] 4\t3", "more than one"),
        ("[MIN ]\t3", "without arguments"),
        ("\t3", "empty"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, row, message):
    path = tmp_path / "basic_train.tsv"
    path.write_text(f"Source\tTarget\n[MAX 1 2 ]\t2\n{row}\n")
    with pytest.raises(UserError, match=rf"basic_train.tsv:3: .*{message}"):
        listops.read_tsv(path)


@pytest.mark.parametrize("content", [b"", b"Target\tSource\n", b"Source\tTarget\n", b"\xff\xfe\n"])
def test_a_file_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "basic_val.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"basic_val.tsv:"):
        listops.read_tsv(path)


def test_stored_and_loaded(tmp_path):
    config = listops.ListopsConfig(name="tiny", grammar=SMALL, sizes=(60, 20, 30), seed=9)
    leftover = tmp_path / "listops" / "tiny" / "incomplete.KILLED_1.0.0"  # as TFDS names it
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("half")
    data_set = store.make(listops.Listops, config, tmp_path)
    store.prepare(data_set)
    assert not leftover.exists()
    expected, labels = listops.generate(110, seed=9, grammar=SMALL)
    stored = {}
    for split in tasks.SPLITS:
        for example in store.load(data_set, split):
            stored[example["tokens"].astype(np.uint8).tobytes()] = (split, example["label"])
    splits = ["train"] * 60 + ["validation"] * 20 + ["test"] * 30
    assert stored == {
        s.tobytes(): (split, label)
        for s, split, label in zip(expected, splits, labels, strict=True)
    }


def test_damaged_data_is_said(tmp_path):
    config = listops.ListopsConfig(name="tiny", grammar=SMALL, sizes=(20, 5, 5))
    data_set = store.make(listops.Listops, config, tmp_path)
    with pytest.raises(UserError, match="missing"):
        store.load(data_set, "train")
    store.prepare(data_set)
    (shard,) = tmp_path.rglob("*-train.array_record*")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(UserError, match=r"damaged|incomplete"):
        store.load(data_set, "train")
    shard.unlink()
    with pytest.raises(UserError, match=r"damaged|incomplete"):
        store.load(data_set, "train")


def test_official_files_are_a_task_and_brackets_may_go(tmp_path):
    source = tmp_path / "lra_release" / "listops-1000"
    source.mkdir(parents=True)
    trees = {name: some_trees(i, 10 + i) for i, name in enumerate(("train", "val", "test"))}
    for name, some in trees.items():
        write_tsv(source / f"basic_{name}.tsv", some)
    task = tasks.get("listops")
    loaded = task.load("validation", tmp_path / "data", source=str(tmp_path))
    assert sorted(map(str, (parse(e["tokens"]) for e in loaded))) == sorted(map(str, trees["val"]))
    assert all(value(parse(e["tokens"])) == e["label"] for e in loaded)
    paper = task.load("validation", tmp_path / "data", source=str(tmp_path), brackets=False)
    for full, dropped in zip(loaded, paper, strict=True):
        assert list(dropped["tokens"]) == [t for t in full["tokens"] if SYMBOL[int(t)] != "]"]
    other = tmp_path / "another"
    other.mkdir()
    for i, name in enumerate(("train", "val", "test")):
        write_tsv(other / f"basic_{name}.tsv", some_trees(7 + i, 12))
    with pytest.raises(UserError, match=r"another basic_\w+.tsv"):
        task.load("validation", tmp_path / "data", source=str(other))
    (source / "basic_val.tsv").unlink()
    with pytest.raises(UserError, match=r"basic_val.tsv"):
        task.load("test", tmp_path / "other", source=str(tmp_path))
    with pytest.raises(UserError, match="nowhere does not exist"):
        task.load("test", tmp_path / "other", source=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="one of: listops, text, retrieval"):
        tasks.get("lisstops")
    with pytest.raises(UserError, match="train, validation, test"):
        task.load("dev", tmp_path / "data", source=str(tmp_path))


def test_floors_by_brute_force():
    sequences, labels = listops.generate(700, grammar=SMALL)
    task = tasks.get("listops_small")
    right = 0
    for operator in FUNCTIONS:
        under = [v for s, v in zip(sequences, labels, strict=True) if SYMBOL[s[0]] == operator]
        right += max(under.count(digit) for digit in range(10))
    assert task.floors(from_sequences(sequences, labels)) == {
        "commonest label": max(list(labels).count(d) for d in range(10)) / 700,
        "root operator": right / 700,
    }
