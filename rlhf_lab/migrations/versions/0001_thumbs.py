"Form 1: what models said, and thumbs about it."
import sqlalchemy as sa
from alembic import op
from rlhf_lab.core import LabError

revision, down_revision = '0001', None

def table(name: str, *columns):
    whole = sa.BigInteger().with_variant(sa.Integer(), 'sqlite')
    kinds = dict(text=sa.Text(), int=whole)
    made = []
    for words in columns:
        column, kind, *marks = words.rstrip('?').split()
        links = [sa.ForeignKey(mark) for mark in marks if '.' in mark]
        made.append(sa.Column(column, kinds[kind], *links, primary_key='key' in marks, nullable=words.endswith('?'), unique='unique' in marks or None))
    op.create_table(name, *made, sqlite_strict=True)

def upgrade():
    table('generation', 'id text key', 'ts int', 'conversation_id text', 'prompt text', 'messages text?', 'completion text', 'model text', 'run text',
        'weights_sha256 text?', 'sampling text', 'finish_reason text')
    table('event', 'id text key', 'ts int', 'kind text', 'generation_id text generation.id', 'value text', 'supersedes text event.id unique?')

def downgrade(): raise LabError('a feedback store is never taken back to an older form: put a backup in its place')
