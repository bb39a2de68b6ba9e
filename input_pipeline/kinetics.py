"""Classes of Kinetics-400, -600, -700 and -710: which names of the sets are one class."""

from collections.abc import Mapping

from input_pipeline import class_names

# Old name -> name in the merged list. Source: the list of identical labels that VideoMAEv2
# publishes; MMAction2's channel maps encode the same 15 groups.
SYNONYMS = {
    'balloon blowing': 'inflating balloons',
    'changing wheel': 'changing wheel (not on bike)',
    'cooking sausages': 'cooking sausages (not on barbeque)',
    'drinking': 'sipping cup',
    'dying hair': 'dyeing hair',
    'garbage collecting': 'person collecting garbage',
    'hugging': 'hugging (not baby)',
    'making bed': 'making the bed',
    'opening bottle': 'opening bottle (not wine)',
    'passing american football (not in game)': 'passing American football (not in game)',
    'picking fruit': 'picking apples',
    'skiing (not slalom or crosscountry)': 'skiing mono',
    'sniffing': 'smelling feet',
    'throwing ball': 'throwing ball (not baseball or American football)',
    'tying tie': 'tying necktie',
}


def merged_key(name: str) -> str:
    """Equal for two class names of Kinetics exactly if they are one class of Kinetics-710."""
    key = class_names.key(name)
    return _MERGED_KEYS.get(key, key)


def synonym_keys(synonyms: Mapping[str, str]) -> dict[str, str]:
    """Keys of a synonym table.

    Raises:
      ValueError: a name is empty, merged twice, or merged into one that is itself merged away.
    """
    keys: dict[str, str] = {}
    for old, new in synonyms.items():
        before, after = class_names.key(old), class_names.key(new)
        if not before or not after:
            raise ValueError(f'synonyms: {old!r} -> {new!r} has an empty name')
        if keys.get(before, after) != after:
            raise ValueError(f'synonyms: {old!r} is merged into two classes')
        keys[before] = after
    for old, new in synonyms.items():
        after = class_names.key(new)
        if keys.get(after, after) != after:
            raise ValueError(f'synonyms: {old!r} -> {new!r}, but {new!r} is merged away itself')
    return keys


_MERGED_KEYS = synonym_keys(SYNONYMS)
