"Run notebooks and keep what they show: `python .ci/notebooks.py [names…]`, as 33_ppo. Warnings and what names a path of this machine are dropped."
import json, re, subprocess, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parent.parent
place = re.compile(r'(?<![\w.:/])/(work|home|root|tmp|Users|mnt|opt|var)/[\w.-]+')

def shown(output) -> bool:
    "Is this something a reader wants to see?"
    return not place.search(json.dumps(output)) and output.output_type != 'error' and output.get('name') != 'stderr' and 'application/vnd.jupyter.widget-view+json' not in output.get('data', {})

def run(file: Path):
    "Execute a notebook in its folder; what it shows is written back, nothing else changes."
    there = nbformat.read(file, as_version=4)
    done = NotebookClient(nbformat.from_dict(json.loads(json.dumps(there))), timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(file.parent)))).execute()
    for old, new in zip(there.cells, done.cells):
        if old.cell_type != 'code': continue
        hidden = '#| hide' in old.source.split('\n')
        old.outputs = [] if hidden else [output for output in new.outputs if shown(output)]
    nbformat.write(there, file)

if __name__ == '__main__':
    asked = sys.argv[1:]
    for file in sorted((root/'nbs').rglob('*.ipynb')):
        if asked and not any(file.stem.startswith(name) for name in asked) or file.stem == 'index': continue
        print(file.stem, flush=True)
        run(file)
    sys.exit(subprocess.run([Path(sys.executable).with_name('nbdev-clean')], cwd=root).returncode)
