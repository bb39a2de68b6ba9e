"""The study: its table, its runner, its verdicts, its report."""

import collections
import dataclasses
import json

import pytest

from dist_jax import config_arguments, ending, recipe
from dist_jax.configs import base, zero_shot
from dist_jax.reports import page
from input_pipeline import motion_world
from tools import study
from tools.studying import claims, jobs, lists, pictures, report, results, rows, runner

SMOKE = rows.SIZES['smoke']


def in_demos(name):
    """A size with the data and variants of the demos."""
    return dataclasses.replace(rows.SIZES[name], world=rows.CLIPS)


def fields_of(command):
    return [part for part in command if part.startswith('--config')]


@pytest.mark.parametrize('config', sorted({row.config for row in rows.ROWS}))
def test_rows_have_fields_that_are_there(config):
    given = collections.defaultdict(dict)  # variant -> its fields, each value once
    for job in jobs.plan(in_demos('full')):
        variant, *fields = fields_of(job.command) or ['']
        if job.kind != jobs.MEMORY and variant.startswith(f'--config=configs/{config}.py:'):
            given[variant] |= dict.fromkeys(field for field in fields if '{out}' not in field)
    for variant, fields in given.items():
        base.check(config_arguments.read_config([variant, *fields]))


@pytest.mark.parametrize('name', rows.SIZES)
def test_jobs_come_after_what_they_need(name):
    planned = jobs.plan(rows.SIZES[name])
    names = [job.name for job in planned]
    assert len(set(names)) == len(names)
    for place, job in enumerate(planned):
        assert set(job.needs) <= set(names[:place])
    trained = sum(job.kind == jobs.TRAIN for job in planned)
    assert trained <= (80 if name == 'small' else 1000)
    # A size goes on from a smaller one.
    if name == 'small':
        larger = {job.name: job.command for job in jobs.plan(rows.SIZES['full'])}
        assert all(larger[job.name] == job.command for job in planned)


def test_rows_of_the_main_table_see_as_many_clips():
    planned = jobs.plan(rows.SIZES['small'])
    main = {row.name for row in rows.ROWS if row.group == 'main' and row.trained}
    seen = collections.defaultdict(set)
    for job in planned:
        if job.row in main and job.kind == jobs.TRAIN:
            given = dict(part.split('=') for part in fields_of(job.command)[1:])
            seen[job.data].add((given['--config.num_steps'], given['--config.batch_size']))
    assert seen.keys() == {'motion', 'looks'} and all(len(kinds) == 1 for kinds in seen.values())


def test_claims_are_about_rows_and_tests_that_are_there():
    known = {f'{row.name}/{data}' for row in rows.ROWS for data in row.data}
    known |= {test.name for test in rows.TESTS}
    for claim in claims.CLAIMS:
        for comparison in claim.comparisons:
            assert {comparison.first, comparison.second} <= known, claim.name
    # Texts and what STS starts from are in tables alone.
    drawn = {row.family for row in rows.ROWS} - {'retrieval', 'pictures'}
    assert drawn == pictures.COLOURS.keys()
    assert {each.group for each in (*rows.ROWS, *rows.TESTS)} == rows.GROUPS.keys()


def test_every_list_opens_as_it_is_evaluated(tmp_path):
    motion_world.generate(
        tmp_path / lists.DATA / 'world',
        num_train=32,
        num_val=16,
        num_test=16,
        num_new_looks=6,
        num_new_motions=4,
    )
    for kind, data in rows.WORLD.data.items():
        config = zero_shot.get_config('world')
        for name, value in jobs.test_list(data).items():
            config.update_from_flattened_dict({name: value.replace('{out}', str(tmp_path))})
        if kind == 'captions':
            config.task.name = 'retrieve'
        source = recipe.open_split(config, 'val')
        assert len(source) >= 4, kind
        if kind.endswith('_new'):
            known = rows.WORLD.data[kind.removesuffix('_new')].labels
            seen = (tmp_path / lists.DATA / 'world' / known).read_text().splitlines()
            assert source.num_classes >= 4 and not set(source.class_names) & set(seen)


def test_groups_bring_what_they_start_from():
    names = {job.row for job in jobs.plan(rows.SIZES['small'], ['sts'])}
    assert names == {'sts_pictures', 'sts_plain', 'sts_scratch', 'sts_scratch_plain'}
    tested = jobs.plan(rows.SIZES['small'], ['zero-shot'])
    assert {job.row for job in tested} == {'dist'}


def test_shares_are_balanced_and_within_each_other():
    text = ''.join(f'train/{i:03}.mp4 {i % 4}\n' for i in range(80))
    kept = {percent: lists.cut(text, percent).splitlines() for percent in (5, 10, 50, 100)}
    assert [len(lines) for lines in kept.values()] == [4, 8, 40, 80]
    for lines in kept.values():
        counts = collections.Counter(line.split()[-1] for line in lines)
        assert len(counts) == 4 and len(set(counts.values())) == 1
    assert set(kept[5]) < set(kept[10]) < set(kept[50]) < set(kept[100])
    assert lists.cut('a b.mp4 0\nc.mp4 0\n', 1) == 'a b.mp4 0\n'  # of each class one at least


class Stub:
    """Takes the place of a process: leaves what a run, a test or a look at memory leaves."""

    def __init__(self, top1=lambda name: 0.5, broken=(), stops_at=''):
        self.top1, self.broken, self.stops_at, self.ran = top1, broken, stops_at, []

    def __call__(self, command, log, env):
        folder = log.parent
        self.ran.append(folder.name)
        log.write_text('a line\nthe last line\n')
        if folder.name == self.stops_at:
            raise KeyboardInterrupt
        if folder.name in self.broken:
            return 1
        assert '{out}' not in ' '.join(command) and env['JAX_COMPILATION_CACHE_DIR']
        top1 = self.top1(folder.name)
        kind = command[1] if command[0] == 'dist_jax' else jobs.MEMORY
        if kind == jobs.MEMORY:
            found = {'arguments': 10, 'total': 10**8}
        elif kind == jobs.EVALUATE:
            found = {'top1': top1, 'num_videos': 400, 't2v_r1': 0.1, 'v2t_r1': 0.1, 'seconds': 3.0}
        else:
            given = {'top1': top1, 't2v_r1': top1, 'v2t_r1': top1, 'num_videos': 400}
            found = {f'val_{name}': value for name, value in given.items()}
            found |= {'num_classes': [8], 'trainable_parameters': 1234, 'step': 4, 'seconds': 9.0}
            (folder / 'config.json').write_text('{"batch_size": 32}')
            row = {'step_seconds': 0.25, 'compute_seconds': 0.2, 'clips_per_second': 128.0}
            row['data_wait_seconds'] = 0.05
            slow = {name: 100.0 for name in row}
            lines = [{'step': i, **(row if i else slow)} for i in range(3)]
            (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
        (folder / jobs.RESULTS[kind]).write_text(json.dumps(found))
        return 0


def test_what_is_done_is_not_done_again(tmp_path):
    planned = jobs.plan(SMOKE)
    names = [job.name for job in planned]
    stopped = Stub(stops_at=names[2])
    with pytest.raises(KeyboardInterrupt):
        runner.run(tmp_path, planned, stopped)
    assert stopped.ran == names[:3]
    second = Stub()
    assert runner.run(tmp_path, planned, second) == []
    assert second.ran == names[2:]  # from the one that was stopped
    third = Stub()
    assert runner.run(tmp_path, planned, third) == [] and not third.ran


def test_a_failure_is_written_down_and_the_rest_goes_on(tmp_path):
    planned = jobs.plan(SMOKE)
    broken = 'dist_motion_seed0'
    stub = Stub(broken=(broken,))
    after = [f'{rows.fusion_name("motion_new", 0.5)}_seed0', 'dist_memory']
    assert [job.name for job in runner.run(tmp_path, planned, stub)] == [broken, *after]
    assert stub.ran == [job.name for job in planned if job.name not in after]
    failures = {job.name: runner.failure_of(tmp_path, job) for job in planned}
    assert failures[broken]['code'] == 1 and failures[broken]['log'][-1] == 'the last line'
    assert all(failures[name]['log'] == [f'needs {broken}, which failed'] for name in after)
    again = Stub()
    assert runner.run(tmp_path, planned, again) == [] and again.ran == [broken, *after]


def test_the_result_of_another_command_is_not_taken(tmp_path):
    planned = jobs.plan(SMOKE)
    runner.run(tmp_path, planned, Stub())
    longer = jobs.plan(dataclasses.replace(SMOKE, steps=5))
    with pytest.raises(ValueError, match=r'num_steps=4.*num_steps=5.*choose another --out'):
        runner.run(tmp_path, longer, Stub())


def test_what_was_made_of_another_run_is_not_taken(tmp_path):
    planned = jobs.plan(SMOKE)
    runner.run(tmp_path, planned, Stub())
    summary = tmp_path / jobs.RUNS / 'dist_motion_seed0' / jobs.RESULTS[jobs.TRAIN]
    summary.write_text(summary.read_text().replace('0.5', '0.6'))
    with pytest.raises(ValueError, match='was made of another dist_motion_seed0'):
        runner.run(tmp_path, planned, Stub())


@pytest.mark.parametrize('left', ['{"val_error": "no accuracy"}', '{"val_top', 'null'])
def test_a_run_without_a_figure_failed(tmp_path, left):
    def execute(command, log, env):
        (log.parent / 'summary.json').write_text(left)
        return 0

    (job, *_) = jobs.plan(SMOKE)
    assert runner.run(tmp_path, [job], execute) == [job]
    (why,) = runner.failure_of(tmp_path, job)['log']
    assert why == 'no accuracy' or 'cannot be read' in why
    for record in ('{"code": 0}', '{"code": 0, "more": 1}'):
        (tmp_path / jobs.RUNS / job.name / runner.RECORD).write_text(record)
        assert not runner.is_done(tmp_path, job) and not runner.failure_of(tmp_path, job)


def test_a_run_that_another_process_has_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'SETTLE_SECONDS', 0.0)
    (job, *_), codes = jobs.plan(SMOKE), [ending.AGAIN, ending.AGAIN]
    stub = Stub()
    start = lambda *call: codes.pop() if codes else stub(*call)  # noqa: E731
    assert runner.run(tmp_path, [job], start) == [] and runner.is_done(tmp_path, job)


def test_a_process_leaves_its_output_and_its_code(tmp_path):
    log = tmp_path / 'job.log'
    assert runner.execute(['this'], log, {}) == 0
    assert 'Namesake' not in log.read_text() and 'Beautiful' in log.read_text()
    assert runner.execute(['tools_that_is_not_there'], log, {}) == 1
    assert 'No module named' in log.read_text()


def cells(**values):
    """Of runs 'row__data' with these accuracies, on 400 videos."""
    return results.Cells(
        {
            'name': '',
            'row': key.split('__')[0],
            'data': key.split('__')[1],
            'seed': seed,
            'test': '',
            'figures': {'top1': value, 'num_videos': 400},
            'compute_seconds': value,
        }
        for key, found in values.items()
        for seed, value in enumerate(found)
    )


AGAINST = claims.Comparison('dist/motion', 'evl/motion')
SURE = (0.80, 0.81, 0.82)


@pytest.mark.parametrize(
    'first, second, verdict',
    [
        (SURE, (0.60, 0.61, 0.62), claims.HELD),
        ((0.60, 0.61, 0.62), SURE, claims.NOT_HELD),
        (SURE, (0.60, 0.75, 0.90), claims.NOISY),
        (SURE, (), claims.MISSING),
        # The spread of EVL and DiST together stands for what one seed cannot say.
        ((0.80,), (0.60, 0.61, 0.62), claims.HELD),
        ((0.625,), (0.60, 0.61, 0.62), claims.NOISY),
        ((0.80,), (0.60,), claims.NOISY),  # nobody knows a spread
        # All alike, to the video: no difference.
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), claims.NOT_HELD),
    ],
)
def test_verdicts(first, second, verdict):
    found = claims.judge(cells(dist__motion=first, evl__motion=second), AGAINST)
    assert found.verdict == verdict
    if verdict != claims.MISSING:
        assert found.pooled == (1 in (len(first), len(second)))


def test_little_may_be_lost_where_a_claim_says_so():
    keeps = dataclasses.replace(AGAINST, wants=claims.KEEPS)
    near, far = (0.800, 0.801, 0.802), (0.900, 0.901, 0.902)
    kept = cells(dist__motion=near, evl__motion=[value + 0.005 for value in near])
    assert claims.judge(kept, keeps).verdict == claims.HELD
    assert claims.judge(kept, AGAINST).verdict == claims.NOT_HELD
    assert claims.judge(cells(dist__motion=near, evl__motion=far), keeps).verdict == claims.NOT_HELD


def test_of_costs_less_is_better_and_differences_are_relative():
    cheaper = dataclasses.replace(AGAINST, figure='compute_seconds')
    found = claims.judge(cells(dist__motion=(0.09, 0.1, 0.11), evl__motion=(0.2,)), cheaper)
    assert found.verdict == claims.HELD and found.difference == pytest.approx(0.5)
    assert not found.pooled
    found = claims.judge(cells(dist__motion=(0.2,), evl__motion=(0.09, 0.1, 0.11)), cheaper)
    assert found.verdict == claims.NOT_HELD and found.difference == pytest.approx(-1)


def test_a_claim_holds_if_all_comparisons_do():
    claim = claims.CLAIMS[0]
    verdicts = [claims.HELD, claims.NOISY, claims.MISSING, claims.NOT_HELD]
    for count in range(1, 5):
        found = tuple(map(claims.Finding, verdicts[:count]))
        assert claims.Judged(claim, found).verdict == verdicts[count - 1]


def accuracy(name):
    """Of a made-up study, in which every part helps a little and seeds differ."""
    whole = 0.8 if name.startswith('dist') else 0.7
    fewer = 0.15 * ('no_' in name) + 0.3 * ('percent' in name) + 0.5 * ('frame_mean' in name)
    return whole - fewer + 0.01 * int(name[-1]) if name[-1].isdigit() else whole - fewer


def test_the_report_of_a_whole_study(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, 'execute', Stub(accuracy, ('evl_no_conv_motion_seed0',)))
    monkeypatch.setattr(lists, 'prepare', lambda *_: None)
    monkeypatch.setattr(page, 'png', lambda draw, colours: b'')  # files have them, too
    assert study.main([f'--out={tmp_path}']) == 1
    shown = capsys.readouterr().out
    assert 'evl_no_conv_motion_seed0 failed: the last line' in shown
    found = json.loads((tmp_path / report.STUDY).read_text())
    assert found['cores'] >= 1 and found['versions']['jax'] and found['chance']['motion'] == 1 / 8
    run = next(run for run in found['runs'] if run['name'] == 'dist_motion_seed1')
    assert run['figures']['top1'] == pytest.approx(0.81) and run['seed'] == 1
    assert run['clips_seen'] == 128 and run['training_seconds'] == 0.8
    verdicts = {name: claim['verdict'] for name, claim in found['claims'].items()}
    assert verdicts['dist_branches'] == claims.HELD
    assert verdicts['evl_parts'] == claims.MISSING
    assert found['failed'].keys() == {'evl_no_conv_motion_seed0'}
    shown = (tmp_path / report.REPORT).read_text()
    assert '81.0 ± 1.0 %' in shown and 'Held.' in shown and 'the last line' in shown
    assert 'src="http' not in shown and shown.count('<img') == 4
    text = (tmp_path / report.RESULTS).read_text()
    assert '| DiST | 81.0 ± 1.0 % |' in text and '- **Held.**' in text
    assert '| chance | 12.5 % | 12.5 % |' in text and '| chance | 0.2 % | 0.2 % |' in text
    for picture in ('trade_offs', 'parts', 'shares', 'fusion'):
        assert (tmp_path / f'{picture}.png').read_bytes().startswith(b'\x89PNG')


def test_a_plan_is_shown_and_nothing_run(tmp_path, monkeypatch, capsys):
    assert study.main([f'--out={tmp_path}/new', '--only=sts', '--dry_run']) == 0
    assert '4 runs and 0 evaluations, about 3:20 left' in capsys.readouterr().out
    assert not any(tmp_path.iterdir())
    monkeypatch.setitem(rows.SIZES, 'small', dataclasses.replace(SMOKE, steps=5))
    runner.run(tmp_path, jobs.plan(SMOKE), Stub())
    with pytest.raises(SystemExit):
        study.main([f'--out={tmp_path}', '--dry_run'])
    assert 'was made by another command' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        study.main(['--only=sts,rest'])
    assert 'no rest; there are: main' in capsys.readouterr().err
