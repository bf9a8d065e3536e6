CREATE TABLE schedules (
    name         text   COLLATE "C" PRIMARY KEY,
    definition   text   NOT NULL,             -- JSON
    revision     uuid   NOT NULL,             -- new with every change of the definition
    next_at      bigint,                      -- the next tick to be fired; null while paused
    last_tick    bigint,                      -- the newest that was fired
    last_skipped bigint,
    fired        bigint NOT NULL DEFAULT 0,   -- counts of ticks
    skipped      bigint NOT NULL DEFAULT 0,
    missed       bigint NOT NULL DEFAULT 0,
    created_at   bigint NOT NULL,
    updated_at   bigint NOT NULL
);

CREATE INDEX schedules_next ON schedules (next_at) WHERE next_at IS NOT NULL;

-- The schedule and the tick that recorded a task.
ALTER TABLE tasks ADD COLUMN schedule text COLLATE "C", ADD COLUMN tick bigint;

-- A tick has one task. Only tasks of schedules pay for these two.
CREATE UNIQUE INDEX tasks_tick ON tasks (schedule, tick) WHERE schedule IS NOT NULL;
CREATE INDEX tasks_schedule_open ON tasks (schedule) WHERE schedule IS NOT NULL AND state < 5;
