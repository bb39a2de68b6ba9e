import pytest

from input_pipeline.class_names import as_words, mirror_pairs
from input_pipeline.datasets import DATASETS

SIDES = {
    86: 'Pulling something from left to right',
    87: 'Pulling something from right to left',
    93: 'Pushing something from left to right',
    94: 'Pushing something from right to left',
    166: 'Turning the camera left while filming something',
    167: 'Turning the camera right while filming something',
}
# The other official names that have such a word in them, and one without.
OTHERS = {
    50: 'Plugging something into something but pulling it right out as you remove your hand',
    119: 'Putting something upright on the table',
    173: 'Wiping something off of something',
}


def test_pairs_of_the_official_label_map_are_the_recorded_ones():
    names = [(SIDES | OTHERS).get(k, f'Class {k}') for k in range(174)]
    recorded = DATASETS['something_v2'].flip.label_pairs
    assert mirror_pairs(names) == recorded == ((86, 87), (93, 94), (166, 167))
    assert mirror_pairs(names[::-1]) == tuple((173 - b, 173 - a) for a, b in recorded[::-1])


@pytest.mark.parametrize(
    ('names', 'pairs'),
    [
        (('turn left', 'stop', 'Turn Right'), ((0, 2),)),
        (('turn_left', 'turn_right'), ((0, 1),)),
        (('TurnLeft', 'TurnRight'), ((0, 1),)),
        (('rotate clockwise', 'rotate counterclockwise'), ((0, 1),)),
        (('wave, left hand', 'wave, right hand', 'wave'), ((0, 1),)),
        (('turn left', 'stop'), ()),
        (('eating leftovers', 'eating rightovers'), ()),
        (('from left to right', 'from right to right'), ()),
    ],
)
def test_names_that_a_mirror_exchanges_are_pairs(names, pairs):
    assert mirror_pairs(names) == pairs


def test_identifiers_become_words_and_texts_stay():
    names = ('ApplyEyeMakeup', 'YoYo', 'TaiChi', 'HandstandPushups', 'CleanAndJerk', 'Archery')
    words = ('Apply Eye Makeup', 'Yo Yo', 'Tai Chi', 'Handstand Pushups', 'Clean And Jerk')
    assert as_words(names) == (*words, 'Archery')
    assert as_words(('brush_hair', 'cartwheel', 'shoot_ball')) == (
        'brush hair',
        'cartwheel',
        'shoot ball',
    )
    for kept in (
        ('TV', '4x4', 'PhD', 'iPhone', 'n01440764'),
        ('watching YouTube', 'ApplyEyeMakeup'),
    ):
        assert as_words(kept) == kept
