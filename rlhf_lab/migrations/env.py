"Alembic starts here: `feedback.migrate` hands over the connection, in a transaction of its own."
from alembic import context

context.configure(connection=context.config.attributes['connection'], transactional_ddl=True)
with context.begin_transaction(): context.run_migrations()
