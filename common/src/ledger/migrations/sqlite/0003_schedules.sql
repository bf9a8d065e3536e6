CREATE TABLE schedules (
    name         TEXT    PRIMARY KEY,
    definition   TEXT    NOT NULL,            -- JSON
    revision     BLOB    NOT NULL,            -- UUID, new with every change of the definition
    next_at      INTEGER,                     -- the next tick to be fired; null while paused
    last_tick    INTEGER,                     -- the newest that was fired
    last_skipped INTEGER,
    fired        INTEGER NOT NULL DEFAULT 0,  -- counts of ticks
    skipped      INTEGER NOT NULL DEFAULT 0,
    missed       INTEGER NOT NULL DEFAULT 0,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL
) WITHOUT ROWID;

CREATE INDEX schedules_next ON schedules (next_at) WHERE next_at IS NOT NULL;

-- The schedule and the tick that recorded a task.
ALTER TABLE tasks ADD COLUMN schedule TEXT;
ALTER TABLE tasks ADD COLUMN tick INTEGER;

-- A tick has one task. Only tasks of schedules pay for these two.
CREATE UNIQUE INDEX tasks_tick ON tasks (schedule, tick) WHERE schedule IS NOT NULL;
CREATE INDEX tasks_schedule_open ON tasks (schedule) WHERE schedule IS NOT NULL AND state < 5;
