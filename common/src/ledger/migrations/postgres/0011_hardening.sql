-- From here on everything is in the schema `tasklane`, which the steps find by their search path (schema.rs). Statements
-- and the bodies of functions name it: the search path of a session is the application's.
ALTER FUNCTION tasklane_now() RENAME TO now_ms;
DROP FUNCTION tasklane_paused();
DROP FUNCTION tasklane_gates();

-- What a claim asks: which queues are paused, and which tasks must be claimed behind the limits' lock. A pause takes the
-- lock for itself, so it waits for the claims that may not have seen it. The tables must be read as they are behind the
-- lock, not as they were when the claim began: a volatile function of PL/pgSQL looks anew with each of its statements.
CREATE FUNCTION gates(OUT paused text[], OUT limited text[], OUT keys boolean) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(8386110886424704371);
    paused := (SELECT coalesce(array_agg(name), '{}') FROM tasklane.paused_queues);
    SELECT coalesce(array_agg(scope) FILTER (WHERE scope NOT LIKE 'key:%'), '{}'),
           coalesce(bool_or(scope LIKE 'key:%'), false)
    INTO limited, keys
    FROM tasklane.limits WHERE max_running IS NOT NULL OR rate_tasks IS NOT NULL;
END
$$;

-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id uuid NOT NULL PRIMARY KEY,
    -- What the clock said when it was last believed. Null where it is not known how long ago that was.
    clock_at bigint
);
INSERT INTO ledger (id, clock_at)
SELECT gen_random_uuid(), CASE WHEN NOT EXISTS (SELECT 1 FROM tasks) THEN now_ms() END;

-- When a schedule's next tick was computed: behind the clock, unless that has gone back since.
ALTER TABLE schedules ADD COLUMN planned_at bigint;
CREATE INDEX schedules_planned ON schedules (planned_at);

-- The newest call that changed a task, as JSON: what it did, who made it, its request's id, when.
ALTER TABLE tasks ADD COLUMN last_change text;

-- Who has paused a queue or a schedule.
ALTER TABLE paused_queues ADD COLUMN paused_by text;
ALTER TABLE schedules ADD COLUMN paused_at bigint;
ALTER TABLE schedules ADD COLUMN paused_by text;

-- What the args are told by: a message that has others starts nothing. Null where an earlier release has recorded them.
ALTER TABLE tasks ADD COLUMN args_digest bigint;
-- How many ticks of a schedule were skipped since one was fired.
ALTER TABLE schedules ADD COLUMN skipped_in_a_row bigint NOT NULL DEFAULT 0;

-- What an operator calls a worker and finds it by, and when and how it went.
ALTER TABLE workers ADD COLUMN name text;
ALTER TABLE workers ADD COLUMN pid bigint;
ALTER TABLE workers ADD COLUMN ended_at bigint;
ALTER TABLE workers ADD COLUMN ended smallint;

-- The newest task that does a failed one's work with other args.
ALTER TABLE tasks ADD COLUMN retried_by uuid;
