-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id BLOB NOT NULL PRIMARY KEY,
    -- What the clock said when it was last believed. Null where it is not known how long ago that was.
    clock_at INTEGER
) WITHOUT ROWID;
INSERT INTO ledger (id, clock_at)
SELECT randomblob(16), CASE WHEN EXISTS (SELECT 1 FROM tasks) THEN NULL ELSE CAST(unixepoch('subsec') * 1000 AS INTEGER) END;

-- When a schedule's next tick was computed: behind the clock, unless that has gone back since.
ALTER TABLE schedules ADD COLUMN planned_at INTEGER;
CREATE INDEX schedules_planned ON schedules (planned_at);

-- The newest call that changed a task, as JSON: what it did, who made it, its request's id, when.
ALTER TABLE tasks ADD COLUMN last_change TEXT;

-- Who has paused a queue or a schedule.
ALTER TABLE paused_queues ADD COLUMN paused_by TEXT;
ALTER TABLE schedules ADD COLUMN paused_at INTEGER;
ALTER TABLE schedules ADD COLUMN paused_by TEXT;

-- What the args are told by: a message that has others starts nothing. Null where an earlier release has recorded them.
ALTER TABLE tasks ADD COLUMN args_digest INTEGER;
-- How many ticks of a schedule were skipped since one was fired.
ALTER TABLE schedules ADD COLUMN skipped_in_a_row INTEGER NOT NULL DEFAULT 0;

-- What an operator calls a worker and finds it by, and when and how it went.
ALTER TABLE workers ADD COLUMN name TEXT;
ALTER TABLE workers ADD COLUMN pid INTEGER;
ALTER TABLE workers ADD COLUMN ended_at INTEGER;
ALTER TABLE workers ADD COLUMN ended INTEGER;

-- The newest task that does a failed one's work with other args.
ALTER TABLE tasks ADD COLUMN retried_by BLOB;
