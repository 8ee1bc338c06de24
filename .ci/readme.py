"README.md is the index notebook, as Markdown: `python .ci/readme.py` writes it, a test compares."
from pathlib import Path

root = Path(__file__).resolve().parent.parent

def readme() -> str:
    "What README.md should be."
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(root/'nbs/index.ipynb', 4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != 'raw' and '#| hide' not in cell.source.split('\n')]
    for cell in nb.cells:
        if cell.cell_type == 'code': cell.source = '\n'.join(l for l in cell.source.split('\n') if not l.startswith('#|'))
    text, _ = MarkdownExporter().from_notebook_node(nb)
    lines = [line.rstrip() for line in text.replace('](../', '](').strip().split('\n')]
    return '\n'.join(line for n, line in enumerate(lines) if line or lines[n - 1]) + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme(), encoding='utf-8')
