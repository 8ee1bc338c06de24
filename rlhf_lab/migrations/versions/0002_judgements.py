"Form 2: sessions, all kinds of judgements, provenance, data sets. Thumbs of form 1 become events of whoever works on the machine."
import hashlib, json, time, unicodedata
import sqlalchemy as sa
from alembic import op
from rlhf_lab.core import LabError

revision, down_revision = '0002', '0001'

TABLES = { # A copy that stays: when the notebook changes its tables, a third script follows
    'session': 'id text key, annotator_id text index, created int, consent_version text?, consent_at int?, consent_scope text, locale text, app_version text',
    'dataset_version': 'id text key, parent text dataset_version.id?, created int, filter_spec text, event_high_water text, n_per_kind text, '
        'content_sha256 text, excluded text',
    'checkpoint': 'weights_sha256 text key, name text, stage text, iteration int, step int, parent_sha256 text?, tokenizer_sha256 text?, '
        'chat_template_sha256 text?, run text, dataset_version text dataset_version.id?, created int',
    'generation': 'id text key, ts int, session_id text session.id index, conversation_id text, parent_id text?, turn int, prompt text, messages text?, '
        'rendered_prompt_sha256 text?, prompt_sha256 text index, split text, prompt_token_ids text?, completion text, completion_token_ids text?, '
        'logprobs text?, finish_reason text, model text, stage text, iteration int?, run text, weights_sha256 text?, tokenizer_sha256 text?, '
        'chat_template_sha256 text?, sampling text, backend text, t_start int?, t_first int?, t_end int?, truncated_tokens int, source text, '
        'error text?, erased int?',
    'event': 'id text key, ts int, mono_ns int, kind text, session_id text session.id index, target_ids text, subject text index, payload text, '
        'reason_codes text, comment text, supersedes text event.id unique?, idempotency_key text unique, ui text, guideline_version text?, '
        'schema_version int, erased int?',
    'dataset_row': 'dataset_version text dataset_version.id key, format text key, row_hash text key, event_id text event.id key index',
    'battle': 'id text key, session_id text session.id, left_gen text generation.id, right_gen text generation.id, pair_p real, left_p real, '
        'state text, created int',
    'label_item': 'id text key, mode text, generation_ids text, gold_answer text?, min_submitted int, created int',
    'lease': 'item_id text label_item.id key, session_id text session.id key, state text, draft text, expires int'}

def table(name: str, words: str) -> sa.Table:
    types = dict(text=sa.Text(), int=sa.BigInteger().with_variant(sa.Integer(), 'sqlite'), real=sa.Double().with_variant(sa.REAL(), 'sqlite'))
    columns = []
    for one in words.split(', '):
        column, kind, *marks = one.rstrip('?').split()
        links = [sa.ForeignKey(mark) for mark in marks if '.' in mark]
        columns.append(sa.Column(column, types[kind], *links, primary_key='key' in marks, nullable=one.endswith('?'),
            unique='unique' in marks or None, index='index' in marks or None))
    return op.create_table(name, *columns, sqlite_strict=True)

def prompt_hash(prompt: str, messages: str|None) -> str:
    normal = lambda text: ' '.join(unicodedata.normalize('NFC', text).split())
    said = normal(prompt) if messages is None else json.dumps([(m['role'], normal(m['content'])) for m in json.loads(messages)])
    return hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()

SQLITE = '''
CREATE TRIGGER event_forever BEFORE UPDATE ON event WHEN NEW.erased IS NULL OR NEW.id != OLD.id OR NEW.kind != OLD.kind OR NEW.target_ids != OLD.target_ids
    BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;;
CREATE TRIGGER event_stays BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never deleted'); END;;
PRAGMA user_version = 2
'''
POSTGRES = '''
CREATE FUNCTION event_forever() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'DELETE' THEN RAISE EXCEPTION 'events are never deleted'; END IF;
    IF NEW.erased IS NULL OR NEW.id != OLD.id OR NEW.kind != OLD.kind OR NEW.target_ids != OLD.target_ids THEN
        RAISE EXCEPTION 'events are never changed'; END IF;
    RETURN NEW; END $$;;
CREATE TRIGGER event_forever BEFORE UPDATE OR DELETE ON event FOR EACH ROW EXECUTE FUNCTION event_forever()
'''

def upgrade():
    db = op.get_bind()
    sqlite = db.dialect.name == 'sqlite'
    for kind, name in (('VIEW', 'vote'), ('VIEW', 'last_event'), ('TRIGGER', 'event_forever'), ('INDEX', 'event_generation')):
        if sqlite: op.execute(f'DROP {kind} IF EXISTS {name}')
    said, judged = (db.execute(sa.text(f'SELECT * FROM {name} ORDER BY id')).mappings().all() for name in ('generation', 'event'))
    op.drop_table('event'); op.drop_table('generation')
    made = {name: table(name, words) for name, words in TABLES.items()}
    now = time.time_ns()//1000
    op.bulk_insert(made['session'], [dict(id='', annotator_id='local', created=now, consent_at=now, consent_scope='store,train', locale='', app_version='')])
    digests = [prompt_hash(row['prompt'], row['messages']) for row in said]
    op.bulk_insert(made['generation'], [dict(row, session_id='', turn=0, prompt_sha256=digest, split='train' if int(digest, 16) % 10 else 'validation',
        stage='', backend='{}', truncated_tokens=0, source='form 1') for row, digest in zip(said, digests)])
    op.bulk_insert(made['event'], [dict(id=row['id'], ts=row['ts'], mono_ns=0, kind=row['kind'], session_id='',
        target_ids=json.dumps([row['generation_id']]), subject=f'thumb {row["generation_id"]}',
        payload='{}' if row['value'] == 'none' else json.dumps(dict(value=row['value']), separators=(',', ':')), reason_codes='[]', comment='',
        supersedes=row['supersedes'], idempotency_key=row['id'], ui='{}', schema_version=1) for row in judged])
    for statement in (SQLITE if sqlite else POSTGRES).split(';;'): db.exec_driver_sql(statement)

def downgrade(): raise LabError('a feedback store is never taken back to an older form: put a backup in its place')
