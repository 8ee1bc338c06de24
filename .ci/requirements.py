"requirements.txt from pyproject.toml: what a Hugging Face Space installs."
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent

if __name__ == '__main__':
    project = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']
    lines = ['# Made by .ci/requirements.py from pyproject.toml, for a Hugging Face Space: see docs/space.md', *project['dependencies'], *project['optional-dependencies']['app']]
    (root/'requirements.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')
