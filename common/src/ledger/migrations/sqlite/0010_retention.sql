-- When the task could first have started, kept by its first claim; a replay and an edit of its time begin
-- anew. Its age counts from then.
ALTER TABLE tasks ADD COLUMN first_due_at INTEGER;

-- How long after the end the result is kept; null: as long as the task. A completed task without one has lost it so.
ALTER TABLE tasks ADD COLUMN result_ttl_ms INTEGER;

-- Only tasks whose result is to expire, and has not, pay for it.
CREATE INDEX tasks_expiring ON tasks ((finished_at + result_ttl_ms))
    WHERE result_ttl_ms IS NOT NULL AND result IS NOT NULL;

-- What the pruner deletes, oldest first. The members of a group count from its end and are found by `tasks_group`.
CREATE INDEX tasks_ended ON tasks (queue, finished_at) WHERE finished_at IS NOT NULL AND group_id IS NULL;

-- How long finished tasks of a queue are kept, where that is not the retention.
CREATE TABLE queue_retention (
    name         TEXT    NOT NULL PRIMARY KEY,
    retention_ms INTEGER NOT NULL
) WITHOUT ROWID;
