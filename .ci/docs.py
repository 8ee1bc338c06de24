"The notebooks as a site in _docs: `python .ci/docs.py`. Nothing is executed: what was committed is shown."
import json, shutil, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pages, site = root/'_proc', root/'_docs'

def page(file: Path) -> dict:
    "A notebook as a reader wants it: no hidden cells, no directives."
    nb = json.loads(file.read_text(encoding='utf-8'))
    lines = lambda cell: ''.join(cell['source']).split('\n')
    nb['cells'] = [cell for cell in nb['cells'] if cell['cell_type'] != 'raw' and '#| hide' not in lines(cell)]
    for cell in nb['cells']: cell['source'] = '\n'.join(l for l in lines(cell) if not l.startswith('#| '))
    nb['cells'] = [cell for cell in nb['cells'] if cell['source'].strip()]
    return nb

def name(file: Path) -> str:
    "The page's name: the notebook's, without its number."
    return file.name.split('_', 1)[1] if file.name[0].isdigit() else file.name

def main() -> int:
    "Prepare the pages, render them, move the site into place."
    files = sorted((root/'nbs').rglob('*.ipynb'), key=lambda f: (f.name != 'index.ipynb', f.parent != root/'nbs', f.name))
    texts = [root/f'{text}.md' for text in ('CONTRIBUTING', 'EXPERIMENTS', 'CHANGELOG', 'SECURITY')]
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir()
    for file in files:
        text = json.dumps(page(file), ensure_ascii=False)
        (pages/name(file)).write_text(text.replace('](../', ']('), encoding='utf-8')
    for text in texts: shutil.copy(text, pages)
    shutil.copytree(root/'docs', pages/'docs')
    shutil.copy(root/'LICENSE', pages)
    contents = ''.join(f'      - {name(file)}\n' for file in [*files, *texts])
    (pages/'_quarto.yml').write_text('project:\n  type: website\n  output-dir: _site\nwebsite:\n  title: rlhf_lab\n'
                                     f'  navbar:\n    search: true\n  sidebar:\n    contents:\n{contents}')
    status = subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', pages]).returncode
    if status == 0:
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(pages/'_site', site)
    return status

if __name__ == '__main__': sys.exit(main())
