from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from student.labels import (
    Label,
    OntologyNode,
    ancestors,
    audioset_labels,
    audioset_ontology,
    checkpoint_labels,
    is_audioset,
)

DOG = "/m/0bt9lr"


def audioset_names() -> dict[int, str]:
    return {label.index: label.name for label in audioset_labels()}


def test_labels_are_audiosets_527_in_order(shared: Path) -> None:
    with (shared / "labels" / "class_labels_indices.csv").open(newline="") as file:
        expected = tuple(
            Label(int(row["index"]), row["mid"], row["display_name"])
            for row in csv.DictReader(file)
        )
    assert len(expected) == 527
    assert audioset_labels() == expected


def test_ontology_has_audiosets_632_nodes_with_their_names_and_parents(shared: Path) -> None:
    nodes = json.loads((shared / "labels" / "ontology.json").read_text("utf-8"))
    parents: dict[str, set[str]] = {node["id"]: set() for node in nodes}
    for node in nodes:
        for child in node["child_ids"]:
            parents[child].add(node["id"])
    names = {node["id"]: node["name"] for node in nodes}

    ours = audioset_ontology()
    assert len(names) == 632
    assert {mid: set(node.parent_mids) for mid, node in ours.items()} == parents
    assert all(len(set(node.parent_mids)) == len(node.parent_mids) for node in ours.values())
    assert {mid: node.name for mid, node in ours.items()} == names


def test_ontology_has_the_labels_first_and_in_index_order() -> None:
    nodes = list(audioset_ontology().values())
    assert [node.index for node in nodes] == [*range(527), *[None] * 105]
    assert [(node.index, node.mid, node.name) for node in nodes[:527]] == [
        (label.index, label.mid, label.name) for label in audioset_labels()
    ]


def test_ontology_node_of_a_label_with_two_parents() -> None:
    assert audioset_ontology()["/m/07qf0zm"] == OntologyNode(
        mid="/m/07qf0zm", name="Howl", parent_mids=(DOG, "/m/01z5f"), index=77
    )


def test_ontology_node_that_is_no_label_has_no_index() -> None:
    assert audioset_ontology()["/m/0dgw9r"] == OntologyNode(
        mid="/m/0dgw9r", name="Human sounds", parent_mids=(), index=None
    )


def test_ancestors_of_a_chain_are_nearest_first() -> None:
    names = [audioset_ontology()[mid].name for mid in ancestors("/m/05tny_")]
    assert names == ["Dog", "Domestic animals, pets", "Animal"]


def test_ancestors_of_a_root_are_none() -> None:
    assert ancestors("/m/0jbk") == ()


def test_ancestors_of_a_mid_that_is_not_audiosets_are_none() -> None:
    assert ancestors("/m/nothing") == ()


def test_ancestors_hold_each_mid_once_and_never_the_mid_itself() -> None:
    for mid, node in audioset_ontology().items():
        above = ancestors(mid)
        assert len(set(above)) == len(above)
        assert mid not in above
        assert above[: len(node.parent_mids)] == node.parent_mids


def test_ancestors_are_all_parents_of_all_ancestors() -> None:
    ontology = audioset_ontology()
    for mid in ontology:
        above = set(ancestors(mid))
        expected = set(ontology[mid].parent_mids)
        for parent in ontology[mid].parent_mids:
            expected |= set(ancestors(parent))
        assert above == expected


def test_checkpoint_of_audiosets_names_gets_audiosets_mids() -> None:
    labels = checkpoint_labels(audioset_names())
    assert labels == audioset_labels()
    assert is_audioset(labels)


def test_checkpoint_labels_do_not_depend_on_the_order_of_the_entries() -> None:
    names = dict(reversed(audioset_names().items()))
    assert checkpoint_labels(names) == audioset_labels()


def test_checkpoint_may_write_mids_as_names() -> None:
    mids = {label.index: label.mid for label in audioset_labels()}
    assert checkpoint_labels(mids) == audioset_labels()


def test_checkpoint_may_state_its_mids() -> None:
    mids = [label.mid for label in audioset_labels()]
    assert checkpoint_labels(audioset_names(), mids) == audioset_labels()


def test_own_labels_have_no_mid() -> None:
    assert checkpoint_labels({0: "knock", 1: "Dog", 2: "hiss"}) == (
        Label(0, "", "knock"),
        Label(1, DOG, "Dog"),
        Label(2, "", "hiss"),
    )


def test_own_labels_may_state_mids() -> None:
    assert checkpoint_labels({0: "knock", 1: "Dog"}, ["/x/knock", DOG]) == (
        Label(0, "/x/knock", "knock"),
        Label(1, DOG, "Dog"),
    )


def test_own_labels_are_not_audiosets() -> None:
    assert not is_audioset(checkpoint_labels({0: "knock", 1: "Dog"}))


def test_audiosets_labels_in_another_order_are_not_audiosets() -> None:
    names = audioset_names()
    names[0], names[1] = names[1], names[0]
    labels = checkpoint_labels(names)
    assert not is_audioset(labels)
    assert [label.mid for label in labels[:2]] == ["/m/05zppz", "/m/09x0r"]


@pytest.mark.parametrize("id2label", [{0: "a", 2: "b"}, {1: "a", 2: "b"}, {-1: "a", 0: "b"}])
def test_gaps_in_the_indices_are_refused(id2label: dict[int, str]) -> None:
    with pytest.raises(ValueError, match="must name the indices 0 to 1 without gaps"):
        checkpoint_labels(id2label)


def test_a_checkpoint_without_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 labels"):
        checkpoint_labels({})


def test_generic_names_are_refused() -> None:
    with pytest.raises(ValueError, match="does not name its 3 labels"):
        checkpoint_labels({0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match="names 'hum' more than once"):
        checkpoint_labels({0: "hum", 1: "hiss", 2: "hum"})


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ValueError, match="label 1 ''; every label needs a name"):
        checkpoint_labels({0: "hum", 1: "", 2: "hiss"})


def test_a_label_given_by_its_name_and_by_its_mid_is_refused() -> None:
    with pytest.raises(ValueError, match="more than once"):
        checkpoint_labels({0: "Dog", 1: DOG})


def test_mids_of_another_number_of_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="states 1 mids for 2 labels"):
        checkpoint_labels({0: "hum", 1: "hiss"}, ["/x/hum"])


def test_a_mid_that_contradicts_audiosets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label 1 'Dog' is stated as /m/01yrx, but .* /m/0bt9lr"):
        checkpoint_labels({0: "hum", 1: "Dog"}, ["/x/hum", "/m/01yrx"])


def test_labels_are_read_without_importing_torch() -> None:
    code = (
        "import sys, student.labels; assert len(student.labels.audioset_labels()) == 527; "
        "print([m for m in ('torch', 'transformers', 'apache_beam') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
