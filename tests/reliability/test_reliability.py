"""A few of the kills, failures and hostile documents of `make reliability`."""

import bz2
import os
import random
import sys

import pytest

from reliability import disks, hostile, kills, numerics, sharing
from spectune import reading
from spectune.errors import SpectuneError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes that fork and are killed")


def test_killed_at_any_call_everything_is_old_or_new():
    done = kills.kills(2 * len(kills.CALLS_ALONE), names=kills.CALLS_ALONE)
    assert {times.total() for times in done.values()} == {2}
    assert sum(times["write"] for times in done.values()) >= len(done) / 2


@pytest.mark.parametrize("name", ["export, peft", "import"])
def test_a_command_that_is_killed_leaves_old_or_new(name):
    (done,) = kills.kills(2, names=[f"spectune {name}"]).values()
    assert done["write"] == 1


def test_without_space_everything_is_old_or_new():
    assert kills.full_disks(4, kills.CALLS_ALONE) > len(kills.CALLS_ALONE)
    kills.file_size_limit()


@pytest.mark.parametrize("what", ["forbidden", "small files", "gone"])
def test_a_disk_that_cannot_be_written_is_one_sentence(what):
    assert disks.tried("export, peft", what) == ("not here" if what == "forbidden" and os.geteuid() else "refused")


def test_a_file_in_place_of_a_folder_is_one_sentence():
    assert disks.file_in_place_of_a_folder("import") == "refused"


def test_hostile_inputs_are_read_or_refused():
    outcomes = hostile.at_random(150)
    assert outcomes.keys() == {"read", "refused"}


@pytest.mark.parametrize("odd", hostile.ODD)
@pytest.mark.parametrize(
    "name",
    ["adapter svf", "library", "run.yaml", "JSONL", "safetensors", "results of compare", "decompositions", "base"],
)
def test_what_is_no_file_is_read_by_nobody(name, odd, tmp_path):
    files = hostile.sound(name)
    for key, data in files.items():
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    hostile.make_odd(tmp_path / max(files), odd)
    assert hostile.tried(name, tmp_path) in ("read", "refused")


@pytest.mark.parametrize(("name", "file"), [("run folder", "log.jsonl"), ("base", "chat_template.jinja")])
def test_gigabytes_of_holes_are_not_held(name, file, tmp_path):
    for key, data in hostile.sound(name).items():
        (tmp_path / key).write_bytes(data)
    hostile.make_odd(tmp_path / file, "sparse")
    assert hostile.tried(name, tmp_path) in ("read", "refused")


@pytest.mark.filterwarnings("ignore:.*have less room than the rank")
def test_decompositions_and_methods_of_any_shape():
    for seed in range(60):
        numerics.case(random.Random(seed))


def test_several_at_one_library_and_one_folder():
    sharing.one_library(2)
    sharing.one_adapter(4)
    sharing.one_answer()


@pytest.mark.slow
def test_all_of_it():
    kills.kills(200)
    kills.full_disks(4)
    disks.every()
    hostile.at_random(20_000)
    sharing.one_cache(20)
    sharing.one_comparison()


def test_yaml_is_counted_before_anything_is_made_of_it():
    merged = "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" if i else "a0: &a0 {x: 1}\n" for i in range(9)
    )
    for text in (merged, "[" * 200_000, "- " * 100_000, "&a [*a]", "a: &a {<<: *a}", "[" + "1," * 200_000 + "1]"):
        with pytest.raises(SpectuneError, match="the file"):
            reading.parse_yaml(text, "the file")


def test_a_packed_file_of_gigabytes_is_not_unpacked(tmp_path):
    path = tmp_path / "data.jsonl.bz2"
    path.write_bytes(bz2.compress(b"{" + b" " * (33 << 20)))
    with pytest.raises(SpectuneError, match="line 1: has more than 33,554,432 bytes"):
        hostile.read_records(path.name)(tmp_path)
