-- How many tasks of a scope ('queue:…', 'kind:…', 'key:…', the last perhaps with * at its end) run at once and how
-- often they start, in all workers.
CREATE TABLE limits (
    scope       text     COLLATE "C" PRIMARY KEY,
    max_running integer,
    rate_tasks  integer,              -- so many starts
    rate_per_ms bigint,               -- in so long
    rate_burst  integer,
    max_queued  integer,              -- of queues only
    origin      smallint NOT NULL     -- 0 a settings file, 1 the API
);

-- Places taken. One is free again, whether its row is there or not, when its task does not run under that fence.
CREATE TABLE limit_places (
    scope      text   COLLATE "C" NOT NULL,  -- of the task: never with *
    task_id    uuid   NOT NULL,
    fence      bigint,                       -- of the run; null while the place is kept for a task on its way
    kept_until bigint,
    PRIMARY KEY (scope, task_id)
);
CREATE INDEX limit_places_task ON limit_places (task_id);

-- What goes on from start to start.
CREATE TABLE limit_gates (
    scope   text   COLLATE "C" PRIMARY KEY,
    next_us bigint NOT NULL DEFAULT 0,            -- where the rate's bucket stands, in microseconds since 1970
    turn    text   COLLATE "C" NOT NULL DEFAULT ''  -- the concurrency key of the task that was let go last
);

ALTER TABLE tasks ADD COLUMN concurrency_key text COLLATE "C", ADD COLUMN limited_by text COLLATE "C";

-- Held tasks: accepted, and nobody is to publish them.
CREATE INDEX tasks_held ON tasks (limited_by, (coalesce(concurrency_key, '')), priority DESC, id)
    INCLUDE (queue, run_at) WHERE state = 0 AND due_at IS NULL;

-- What a claim asks: which queues are paused, and which tasks must be claimed behind the limits' lock. See tasklane_paused().
CREATE FUNCTION tasklane_gates(OUT paused text[], OUT limited text[], OUT keys boolean) LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(8386110886424704371);
    paused := (SELECT coalesce(array_agg(name), '{}') FROM paused_queues);
    SELECT coalesce(array_agg(scope) FILTER (WHERE scope NOT LIKE 'key:%'), '{}'),
           coalesce(bool_or(scope LIKE 'key:%'), false)
    INTO limited, keys
    FROM limits WHERE max_running IS NOT NULL OR rate_tasks IS NOT NULL;
END
$$;
