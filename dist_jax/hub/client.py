"""The Hugging Face Hub: `hf://owner/name@revision/file` to files here, and releases to there.

Only files whose names are asked for are fetched, after the Hub said how large they are; what is in
them is read by the readers of local files, which execute nothing. `huggingface_hub` keeps what was
fetched in its own cache and knows the user's token. It is an extra and imported where it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_jax.hub import card as model_card
from dist_jax.hub import release
from dist_jax.models.foreign import MAX_JSON_BYTES, shown
from dist_jax.models.source_files import JSON_BESIDE, main_file, shard_names
from dist_jax.paths import HUB

MAX_BYTES = 64 * 2**30  # of one model; EVA-02-CLIP E/14+ in float32 has 20 GB

_PART = r'[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?'
_NAME = re.compile(rf'({_PART}/{_PART})(?:@(refs/pr/\d+|[^/@]+))?(?:/(.+))?', re.ASCII)
_COMMIT = re.compile('[0-9a-f]{40}')
LOGIN = 'log in with `hf auth login`, or set HF_TOKEN'


@dataclasses.dataclass(frozen=True)
class Reference:
    """What `hf://` names.

    Attributes:
      repo: 'owner/name'.
      revision: branch, tag or commit; None for the main branch.
      path: of a file in it; '' for the repository.
    """

    repo: str
    revision: str | None = None
    path: str = ''

    def __str__(self) -> str:
        at = f'@{self.revision}' if self.revision else ''
        return f'{HUB}{self.repo}{at}' + (f'/{self.path}' if self.path else '')


@dataclasses.dataclass(frozen=True)
class Fetched:
    """What was fetched.

    Attributes:
      path: the file that was chosen, or the folder of all.
      origin: `hf://owner/name@COMMIT`.
    """

    path: Path
    origin: str


def parse(text: str) -> Reference:
    """What `hf://owner/name`, maybe with `@revision` and `/file`, names.

    Raises:
      ValueError: something else.
    """
    found = _NAME.fullmatch(text.removeprefix(HUB))
    at = found and found[2] and found[2].replace('%2F', '/')
    reference = found and Reference(found[1], at, found[3] or '')
    if (
        not text.startswith(HUB)
        or not reference
        or any(part in ('', '.', '..') for part in (reference.path or 'file').split('/'))
        or '\\' in text
        or not text.isprintable()
        or '..' in reference.repo
        or '--' in reference.repo
        or len(text) > 500
    ):
        raise ValueError(
            f'{text!r} names nothing on the Hub; write hf://owner/name, hf://owner/name@revision '
            'or hf://owner/name/file.safetensors'
        )
    return reference


def fetch_checkpoint(text: str) -> Fetched:
    """The files of a foreign checkpoint, as `open_source` reads them.

    Args:
      text: a repository, or one file of it.

    Returns:
      The file that holds the weights, or names their shards; what belongs to it lies beside it.

    Raises:
      ValueError: no such repository, file or checkpoint; no access; too large.
      ConnectionError: the Hub cannot be reached, and nothing was fetched before.
    """
    reference = parse(text)
    with _said(reference):
        listing = _Listing(reference)
        folder, _, name = reference.path.rpartition('/')
        inside = f'{folder}/' if folder else ''
        here = [n.removeprefix(inside) for n in listing.sizes if n.startswith(inside)]
        if reference.path in listing.sizes:
            main = name
        elif any(n.startswith(f'{reference.path}/') for n in listing.sizes):  # a folder
            inside = f'{reference.path}/'
            here = [n.removeprefix(inside) for n in listing.sizes if n.startswith(inside)]
            main = main_file(here, str(reference))
        elif reference.path:
            raise ValueError(f'{reference}: no such file; there are {_some(listing.sizes)}')
        else:
            main = main_file(here, str(reference))
        beside = [name for name in JSON_BESIDE if name in here]
        path = listing.fetch([inside + name for name in (main, *beside)])[0]
        if main.endswith('.index.json'):
            shards = shard_names(path)
            missing = [name for name in shards if name not in here]
            if missing:
                raise ValueError(f'{reference}: shards that are not there: {shown(missing)}')
            listing.fetch([inside + name for name in shards])
    return Fetched(path, listing.origin)


def fetch_release(text: str, *, with_backbone: bool = True) -> Fetched:
    """The folder of a release.

    Args:
      text: a repository.
      with_backbone: fetch its backbone, too, if it holds one.

    Raises:
      ValueError, ConnectionError: as `fetch_checkpoint`.
    """
    reference = parse(text)
    if reference.path:
        raise ValueError(f'{text}: a model is a whole repository; leave out /{reference.path}')
    with _said(reference):
        listing = _Listing(reference)
        wanted = [release.CONFIG, release.NETWORK]
        missing = [name for name in wanted if name not in listing.sizes]
        if missing:
            raise ValueError(
                f'{reference}: no model that `dist_jax push` made (there is no {missing[0]}). A '
                'checkpoint of CLIP or of the authors is converted first: `dist_jax convert '
                f'{reference} FOLDER`'
            )
        if with_backbone and release.BACKBONE in listing.sizes:
            wanted.append(release.BACKBONE)
        return Fetched(listing.fetch(wanted)[0].parent, listing.origin)


def check_repository(name: str) -> str:
    """`owner/name` as it is, of what may have `hf://` before it.

    Raises:
      ValueError: something else.
    """
    reference = parse(name if name.startswith(HUB) else HUB + name)
    if reference.revision or reference.path:
        raise ValueError(f'{name!r}: a repository is owner/name')
    return reference.repo


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = '',
) -> str:
    """Uploads a release; the repository is made if it is not there.

    One commit has all of it. A card that somebody wrote there stays; files of other names stay; a
    backbone that this release does not hold goes.

    Args:
      folder: of the release.
      repo: 'owner/name'.
      private: of a repository that is made here.
      revision: branch; made if it is not there.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      ValueError: no release, or no access.
      ConnectionError: the Hub cannot be reached.
    """
    found = release.read(folder)
    reference = Reference(check_repository(repo), revision)
    hub = _library(str(reference))
    with _said(reference, write=True):
        api = hub.HfApi(endpoint=_endpoint())
        api.create_repo(repo, private=private, exist_ok=True, repo_type='model')
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        there = {file.rfilename for file in info.siblings}
        names = [release.CONFIG, *found.metadata['files']]
        if release.CARD not in there or _is_ours(api, repo, info.sha):
            names.append(release.CARD)
        stale = (there & set(release.FILES)) - {*names, release.CARD}
        operations = [
            *(hub.CommitOperationAdd(name, str(found.folder / name)) for name in names),
            *(hub.CommitOperationDelete(name) for name in sorted(stale)),
        ]
        return api.create_commit(
            repo,
            operations,
            commit_message=message or f'dist_jax: step {found.step}',
            revision=revision,
            parent_commit=info.sha,
        ).commit_url


def _is_ours(api: Any, repo: str, commit: str) -> bool:
    """Whether the card of a repository is one of `model_card`."""
    path = api.hf_hub_download(repo, release.CARD, revision=commit, cache_dir=_cache())
    return model_card.MARK in Path(path).read_text(encoding='utf-8', errors='replace')


class _Listing:
    """The files of a repository at one commit; of the cache where the Hub is not in reach."""

    def __init__(self, reference: Reference):
        self._reference = reference
        self._hub = _library(str(reference))
        self._api = self._hub.HfApi(endpoint=_endpoint())
        try:
            info = self._api.model_info(
                reference.repo, revision=reference.revision, files_metadata=True
            )
            self.commit, self._folder = str(info.sha), None
            self.sizes = {str(file.rfilename): _size(file.size) for file in info.siblings}
        except (TypeError, AttributeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f'{reference}: the answer is not that of a Hub ({_brief(error)}); a proxy or '
                'HF_ENDPOINT may stand between'
            ) from None
        except Exception as error:
            if not _is_unreachable(self._hub, error):
                raise
            self._folder = self._cached(error)
            self.commit = self._folder.name
            files = (path for path in self._folder.rglob('*') if path.is_file())
            self.sizes = {
                path.relative_to(self._folder).as_posix(): path.stat().st_size for path in files
            }
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(f'{reference}: the Hub says commit {shown(self.commit)}')
        self.origin = str(Reference(reference.repo, self.commit))

    def _cached(self, error: Exception) -> Path:
        """The folder of what was fetched earlier; raises `error` if there is none."""
        try:
            return Path(
                self._hub.snapshot_download(
                    self._reference.repo,
                    revision=self._reference.revision,
                    cache_dir=_cache(),
                    local_files_only=True,
                )
            )
        except Exception:
            raise error from None

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Files of these names, which must be among `sizes`."""
        for name in names:
            limit = MAX_JSON_BYTES if name.endswith('.json') else MAX_BYTES
            if self.sizes[name] > limit:
                raise ValueError(
                    f'{self._reference}: {name} has {self.sizes[name]:,} bytes, more than {limit:,}'
                )
        total = sum(self.sizes[name] for name in names)
        if total > MAX_BYTES:
            raise ValueError(
                f'{self._reference}: {total:,} bytes to fetch, more than {MAX_BYTES:,}'
            )
        if self._folder is not None:
            return [self._folder / name for name in names]
        return [self._download(name) for name in names]

    def _download(self, name: str) -> Path:
        # As it was asked for, so that the cache knows later, without a network, what that was.
        for revision in (self._reference.revision, self.commit):
            path = Path(
                self._api.hf_hub_download(
                    self._reference.repo, name, revision=revision, cache_dir=_cache()
                )
            )
            if self.commit in path.parts:  # else somebody has pushed meanwhile
                break
        return path


def _size(said: Any) -> int:
    """Bytes of a file; 0 where the Hub does not say.

    Raises:
      TypeError: it says something else.
    """
    if said is not None and not isinstance(said, int):
        raise TypeError(f'a size is {shown(said)}')
    return max(said or 0, 0)


def _library(what: str) -> Any:
    """`huggingface_hub`.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError(
            f"{what}: the Hub is reached with an extra; pip install 'dist_jax[hub]'"
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get('HF_ENDPOINT') or None


def _cache() -> str | None:
    return os.environ.get('HF_HUB_CACHE') or None


def _is_unreachable(hub: Any, error: Exception) -> bool:
    """Whether the Hub did not answer, or could not."""
    answer = getattr(error, 'response', None)
    if answer is not None:
        return answer.status_code >= 500
    network = hub.errors.HfHubHTTPError.__bases__[0]  # of httpx or requests, by version
    missing = hub.errors.LocalEntryNotFoundError  # it was asked for and gave no answer
    return isinstance(error, (network, missing, ConnectionError, TimeoutError))


@contextlib.contextmanager
def _said(reference: Reference, write: bool = False) -> Iterator[None]:
    """Says what the Hub's answers mean, and what to do."""
    errors = _library(str(reference)).errors
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f'{reference}: its owners ask for terms to be accepted first: open '
            f'{_endpoint() or "https://huggingface.co"}/{reference.repo}, accept them, and {LOGIN}'
        ) from None
    except errors.RepositoryNotFoundError:
        what = 'owner' if write else 'repository'
        raise ValueError(
            f'{reference}: no such {what}, or a private one that this token may not see. Check the '
            f'name, or {LOGIN}'
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f'{reference}: no revision {reference.revision!r} there') from None
    except errors.HfHubHTTPError as error:
        raise _refused(reference, error, write) from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, OSError):
            raise _unreachable(reference, error) from None
        raise ValueError(f'{reference}: {_brief(error)}') from None
    except errors.HFValidationError as error:
        raise ValueError(f'{reference}: {_brief(error)}') from None
    except Exception as error:
        if _is_unreachable(_library(''), error):
            raise _unreachable(reference, error) from None
        raise


def _refused(reference: Reference, error: Any, write: bool) -> Exception:
    code = error.response.status_code
    if code >= 500:
        return _unreachable(reference, error)
    if code in (401, 403):
        do = 'write to' if write else 'read'
        return ValueError(
            f'{reference}: the Hub refuses ({code}): this token may not {do} it. Take another '
            f'token: {LOGIN}'
        )
    if code == 429:
        return ConnectionError(f'{reference}: the Hub asks to wait (429 Too Many Requests)')
    return ValueError(f'{reference}: the Hub answers {code}: {_brief(error)}')


def _unreachable(reference: Reference, error: Exception) -> ConnectionError:
    return ConnectionError(
        f'{reference}: the Hub cannot be reached ({_brief(error)}), and it was not fetched before. '
        'Check the network, HF_ENDPOINT and HF_HUB_OFFLINE; a folder that was fetched elsewhere '
        'will do, too'
    )


def _brief(error: Exception) -> str:
    text = ' '.join((getattr(error, 'server_message', None) or str(error)).split())
    return text[:300] or type(error).__name__


def _some(names: Mapping[str, int]) -> str:
    listed = sorted(names)
    return ', '.join(map(shown, listed[:20])) + (', …' if len(listed) > 20 else '')
