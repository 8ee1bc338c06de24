"""README.md is the index notebook, as Markdown: `python .ci/readme.py [RUN]` writes it, a test compares.

With RUN, a finished quickstart such as runs/quickstart, its table, plot and report become those that README shows."""
import contextlib, json, os, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
index, shown = root/'nbs/index.ipynb', root/'docs/quickstart'

def keep(run: Path):
    "Copy what README shows of a run, and note how it came about."
    shown.mkdir(parents=True, exist_ok=True)
    for name in ('table.json', 'report.md', 'frontier.png'): shutil.copy(run/name, shown)
    asked = json.loads((run/'config.json').read_text(encoding='utf-8'))
    git = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude', '*'], cwd=root, capture_output=True, text=True)
    memory = os.sysconf('SC_PHYS_PAGES')*os.sysconf('SC_PAGE_SIZE')/1e9
    facts = dict(command='rlhf-lab quickstart --tiny' if asked['tiny'] else 'make quickstart', seed=asked['seed'], commit=git.stdout.strip(),
                 machine=f'{os.cpu_count()} cores and {memory:.0f} GB', about=(run/'report.md').read_text(encoding='utf-8').split('\n\n')[1])
    (shown/'run.json').write_text(json.dumps(facts, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def refresh():
    "Run the cells of the index that show something."
    import nbformat
    from execnb.shell import CaptureShell
    sys.path.insert(0, str(root))
    nb, shell = nbformat.read(index, 4), CaptureShell()
    for cell in nb.cells:
        if cell.cell_type != 'code' or '#| eval: false' in cell.source.split('\n'): continue
        with contextlib.chdir(index.parent): cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
        if shell.exc: raise shell.exc
    nbformat.write(nb, index)
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', index], check=True)

def readme() -> str:
    "What README.md should be."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(index, 4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'raw' and '#| hide' not in cell.source.split('\n')]
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        if '#| echo: false' in cell.source: cell.update(cell_type='markdown', source=cell.outputs[0]['data']['text/markdown'])
        else: cell.source = '\n'.join(l for l in cell.source.split('\n') if not l.startswith('#|'))
    nb.metadata.language_info = dict(name='python')
    text, _ = MarkdownExporter().from_notebook_node(nb)
    lines = [line.rstrip() for line in text.replace('](../', '](').strip().split('\n')]
    return '\n'.join(line for n, line in enumerate(lines) if line or lines[n - 1]) + '\n'

if __name__ == '__main__':
    if sys.argv[1:]: keep(Path(sys.argv[1]))
    refresh()
    (root/'README.md').write_text(readme(), encoding='utf-8')
