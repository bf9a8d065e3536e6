-- How many tasks of a scope ('queue:…', 'kind:…', 'key:…', the last perhaps with * at its end) run at once and how
-- often they start, in all workers.
CREATE TABLE limits (
    scope       TEXT    NOT NULL PRIMARY KEY,
    max_running INTEGER,
    rate_tasks  INTEGER,              -- so many starts
    rate_per_ms INTEGER,              -- in so long
    rate_burst  INTEGER,
    max_queued  INTEGER,              -- of queues only
    origin      INTEGER NOT NULL      -- 0 a settings file, 1 the API
) WITHOUT ROWID;

-- Places taken. One is free again, whether its row is there or not, when its task does not run under that fence.
CREATE TABLE limit_places (
    scope      TEXT NOT NULL,         -- of the task: never with *
    task_id    BLOB NOT NULL,
    fence      INTEGER,               -- of the run; null while the place is kept for a task on its way
    kept_until INTEGER,
    PRIMARY KEY (scope, task_id)
) WITHOUT ROWID;
CREATE INDEX limit_places_task ON limit_places (task_id);

-- What goes on from start to start.
CREATE TABLE limit_gates (
    scope   TEXT    NOT NULL PRIMARY KEY,
    next_us INTEGER NOT NULL DEFAULT 0,   -- where the rate's bucket stands, in microseconds since 1970
    turn    TEXT    NOT NULL DEFAULT ''   -- the concurrency key of the task that was let go last
) WITHOUT ROWID;

ALTER TABLE tasks ADD COLUMN concurrency_key TEXT;
ALTER TABLE tasks ADD COLUMN limited_by TEXT;     -- the scope that held it last

-- Held tasks: accepted, and nobody is to publish them.
CREATE INDEX tasks_held ON tasks (limited_by, coalesce(concurrency_key, ''), priority DESC, id, queue, run_at)
    WHERE state = 0 AND due_at IS NULL;
