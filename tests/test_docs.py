"""The pages of the documentation: what links to what, on GitHub and in a clone."""

import re
from pathlib import Path

import pytest

from dist_jax import main
from dist_jax.configs import base
from docs import generate

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])
PAGES = [page for page in PAGES if '_generated' not in page.parts]
FENCE = re.compile(r'^ *```.*?^ *```$', re.MULTILINE | re.DOTALL)


def links(page: Path) -> set[str]:
    """Targets of links and pictures that are no addresses of the web."""
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    found = re.findall(r'\]\(([^()\s]+)\)', re.sub(r'`[^`\n]*`', '', text))
    return {target for target in found if not re.match(r'\w+:', target)}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and MyST make them."""
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    headings = re.findall(r'^#+ +(.*?) *$', text, re.MULTILINE)
    plain = (re.sub(r'[^\w\- ]', '', heading.lower()) for heading in headings)
    return {heading.replace(' ', '-') for heading in plain}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    wrong = []
    for target in links(page):
        path, _, anchor = target.partition('#')
        other = (page.parent / path).resolve() if path else page
        if not other.exists() or not other.is_relative_to(ROOT):
            wrong.append(f'{target}: nothing there')
        elif anchor and anchor not in anchors(other):
            wrong.append(f'{target}: {other.name} has {sorted(anchors(other))}')
    assert not wrong, wrong


def test_the_readme_leads_to_all_parts_of_the_documentation():
    named = ' '.join(links(ROOT / 'README.md'))
    missing = [
        str(page.relative_to(ROOT))
        for page in (ROOT / 'docs').glob('*.md')
        if page.name != 'index.md' and str(page.relative_to(ROOT)) not in named
    ]
    assert not missing, missing


def test_paths_of_pages_in_code_and_texts_exist():
    files = [
        path
        for folder in ('configs', 'dist_jax', 'input_pipeline', 'tools', 'docs', 'tests')
        for path in (ROOT / folder).rglob('*')
        if path.suffix in ('.py', '.sh', '.md') and '_generated' not in path.parts
    ]
    wrong = {
        f'{path.relative_to(ROOT)}: {name}'
        for path in files
        for name in re.findall(r'\bdocs/[\w/]+\.(?:md|svg|gif|png)\b', path.read_text())
        if not (ROOT / name).exists() and path != Path(__file__)
    }
    assert not wrong, wrong


def test_the_references_hold_every_field_row_and_command():
    fields, commands = generate.config_page(), generate.command_page()
    for name in base.flat(base.get_config()):
        assert f'\n`{name}` = ' in fields
    for module in generate.FAMILIES:
        assert all(f'\n| `{row}` | ' in fields for row in module.VARIANTS)
    families = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    documented = {module.__name__.rpartition('.')[2] for module in generate.FAMILIES}
    assert documented == families - {'__init__', 'base', 'inputs'}
    for name, module in main.COMMANDS.items():
        assert f'\n## `{name}`\n' in f'\n{commands}'
        options = re.findall(r'^  (--[a-z_]+)', module.parser().format_help(), re.MULTILINE)
        assert all(f'\n`{option}' in commands for option in options)


def test_help_texts_are_shown_letter_by_letter():
    assert generate.plain("a*b* of data.num_frames, '' for none") == (
        "a\\*b\\* of `data.num_frames`, `''` for none"
    )
    assert generate.examples('a one \\\n    two\n    what it does\nb\nc\n') == (
        '# what it does\na one \\\n    two\n\nb\nc'
    )
