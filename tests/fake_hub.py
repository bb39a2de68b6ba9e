"""The part of the Hugging Face Hub's HTTP interface that `huggingface_hub` calls for models."""

import base64
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = 'hf_writer'


class FakeHub:
    """A server of repositories in memory.

    Attributes:
      url: of the server.
      repos: 'owner/name' -> {'branches': {branch: commit}, 'commits': {commit: {path: bytes}}}.
      private, gated: names of repositories.
      requests: (method, path) of all, in order.
      broken: answer everything with 503.
      listing: what lists the files of every repository, in place of the truth.
    """

    def __init__(self):
        self.repos, self.private, self.gated, self.requests = {}, set(), set(), []
        self.blobs, self.broken, self.messages, self.listing = {}, False, [], None
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self._server.server_port}'
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def add(self, name, files, branch='main'):
        """Commits these files, and no others."""
        repo = self.repos.setdefault(name, {'branches': {}, 'commits': {}})
        commit = hashlib.sha1(f'{name}{branch}{len(repo["commits"])}'.encode()).hexdigest()
        repo['commits'][commit] = dict(files)
        repo['branches'][branch] = commit
        return commit

    def files(self, name, branch='main'):
        repo = self.repos[name]
        return repo['commits'][repo['branches'][branch]]


class _Handler(BaseHTTPRequestHandler):
    hub = None
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def _answer(self, code, body=b'', **headers):
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
            headers['Content-Type'] = 'application/json'
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _refuse(self, code, what, message=''):
        self._answer(code, {'error': message}, X_Error_Code=what, X_Error_Message=message)

    def _handle(self):
        size = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(size) if size else b''
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while chunk := int(self.rfile.readline(), 16):
                body += self.rfile.read(chunk)
                self.rfile.readline()
            self.rfile.readline()
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip('/').split('/')]
        self.hub.requests.append((self.command, url.path))
        if self.hub.broken:
            return self._refuse(503, 'Down', 'down')
        authorised = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if self.command in ('POST', 'PUT') and not authorised and parts[0] != 'lfs':
            return self._refuse(401, '', 'Invalid credentials in Authorization header')
        if parts[0] == 'lfs':
            self.hub.blobs[parts[1]] = body
            return self._answer(200)
        if parts[:2] == ['api', 'validate-yaml']:
            return self._answer(200, {'errors': [], 'warnings': []})
        if parts == ['api', 'repos', 'create']:
            return self._create(json.loads(body))
        if parts[:2] == ['api', 'models']:
            name, rest = '/'.join(parts[2:4]), parts[4:]
        else:
            name, rest = '/'.join(parts[:2]).removesuffix('.git'), parts[2:]
        if name not in self.hub.repos or (name in self.hub.private and not authorised):
            return self._refuse(401 if not authorised else 404, 'RepoNotFound', 'not found')
        if rest[:1] == ['info']:
            return self._batch(json.loads(body))
        repo = self.hub.repos[name]
        revision = rest[1] if len(rest) > 1 else 'main'
        commit = repo['branches'].get(revision, revision)
        if rest[:1] == ['branch']:
            if revision in repo['branches']:
                return self._refuse(409, '', 'exists')
            repo['branches'][revision] = repo['branches']['main']
            return self._answer(200, {})
        if commit not in repo['commits']:
            return self._refuse(404, 'RevisionNotFound', 'no revision')
        files = repo['commits'][commit]
        if rest[:1] in ([], ['revision']):
            if self.hub.listing is not None:
                return self._answer(200, self.hub.listing)
            siblings = [{'rfilename': path, 'size': len(data)} for path, data in files.items()]
            return self._answer(
                200, {'id': name, 'sha': commit, 'siblings': siblings, 'private': False, 'tags': []}
            )
        if rest[0] == 'resolve':
            return self._resolve(name, commit, files, '/'.join(rest[2:]), authorised)
        if rest[0] == 'preupload':
            asked = json.loads(body)['files']
            return self._answer(
                200,
                {
                    'files': [
                        {
                            'path': file['path'],
                            'uploadMode': 'lfs' if 'safetensors' in file['path'] else 'regular',
                            'shouldIgnore': False,
                        }
                        for file in asked
                    ]
                },
            )
        if rest[0] == 'commit':
            return self._commit(name, revision, dict(files), body)
        return self._refuse(404, '', 'no such endpoint')

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, asked):
        name = (
            f'{asked["organization"]}/{asked["name"]}' if asked['organization'] else asked['name']
        )
        if name.startswith('others/'):
            return self._refuse(403, '', 'no rights')
        if name in self.hub.repos:
            return self._answer(409, {'url': f'{self.hub.url}/{name}'})
        self.hub.add(name, {'.gitattributes': b''})
        if asked.get('private') or asked.get('visibility') == 'private':
            self.hub.private.add(name)
        return self._answer(200, {'url': f'{self.hub.url}/{name}'})

    def _resolve(self, name, commit, files, path, authorised):
        if name in self.hub.gated and path != 'README.md':
            return self._refuse(403 if authorised else 401, 'GatedRepo', 'ask')
        if path not in files:
            return self._refuse(404, 'EntryNotFound', 'no file')
        etag = hashlib.sha256(files[path]).hexdigest()
        return self._answer(200, files[path], X_Repo_Commit=commit, ETag=f'"{etag}"')

    def _batch(self, asked):
        objects = [
            {
                'oid': each['oid'],
                'size': each['size'],
                'actions': {'upload': {'href': f'{self.hub.url}/lfs/{each["oid"]}'}},
            }
            for each in asked['objects']
        ]
        return self._answer(200, {'transfer': 'basic', 'objects': objects})

    def _commit(self, name, branch, files, body):
        for line in body.splitlines():
            row = json.loads(line)
            value = row['value']
            if row['key'] == 'header':
                self.hub.messages.append(value['summary'])
            elif row['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif row['key'] == 'lfsFile':
                files[value['path']] = self.hub.blobs[value['oid']]
            elif row['key'] == 'deletedFile':
                del files[value['path']]
        commit = self.hub.add(name, files, branch)
        url = f'{self.hub.url}/{name}/commit/{commit}'
        return self._answer(200, {'commitUrl': url, 'commitOid': commit})
