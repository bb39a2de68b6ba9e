"""Names of topologies, and a machine without the compiler."""

import pytest

from dist_jax.plan import topology


@pytest.mark.parametrize(
    ('text', 'chips', 'name'),
    [
        ('v4:2x2x1', 4, 'v4:2x2x1'),
        ('V4:4x4x8', 128, 'v4:4x4x8'),
        ('v5e:16x16', 256, 'v5e:16x16'),
        ('v5e:1x1', 1, 'v5e:1x1'),
        ('v5p:2x2x2', 8, 'v5p:2x2x2'),
        ('v6e:2x4', 8, 'v6e:2x4'),
    ],
)
def test_names_become_chips(text, chips, name):
    found = topology.parse_topology(text)
    assert (found.num_chips, found.name) == (chips, name)
    two = topology.parse_topology(text, 2)
    assert two.num_chips == 2 * chips and '2 slices' in str(two)


@pytest.mark.parametrize(
    ('text', 'slices', 'message'),
    [
        ('v44:2x2x1', 1, "no chip 'v44'; did you mean 'v4:2x2x1'.*v4, v5e, v5p, v6e"),
        ('tpu', 1, 'Chips: v4, v5e, v5p, v6e'),
        ('v4:2x2', 1, 'v4 has 3 dimensions.*Names that work: v4:2x2x1'),
        ('v4', 1, 'Names that work: v4:2x2x1'),
        ('v4:2x3x1', 1, 'hosts of 2x2x1'),
        ('v5e:2x2x1', 1, 'v5e has 2 dimensions'),
        ('v4:axbxc', 1, 'Names that work'),
        ('v4:2x2x1', 0, '--num_slices=0'),
    ],
)
def test_wrong_names_list_the_right_ones(text, slices, message):
    with pytest.raises(ValueError, match=message):
        topology.parse_topology(text, slices)


def test_without_libtpu_there_is_a_way_out(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda _: None)
    monkeypatch.delenv('TPU_LIBRARY_PATH', raising=False)
    with pytest.raises(topology.MissingCompilerError, match=r"-e '\.\[tpu\]'"):
        topology.prepare_environment()


def test_every_example_is_a_topology():
    for chip, names in topology.EXAMPLES.items():
        assert names and all(topology.parse_topology(n).chip.name == chip for n in names)
