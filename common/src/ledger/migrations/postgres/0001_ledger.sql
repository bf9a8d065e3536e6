-- Times are milliseconds since 1970, UTC, by this server's clock. State codes: common/src/state.rs.
-- Needs PostgreSQL 13 or newer.

-- The one clock of the ledger. It moves on inside a statement, so statements ask once and keep the answer.
CREATE FUNCTION tasklane_now() RETURNS bigint LANGUAGE sql VOLATILE AS
    'SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint';

CREATE TABLE tasks (
    id               uuid     PRIMARY KEY,  -- version 7: the order of ids is the order of submission
    kind             text     NOT NULL,
    queue            text     NOT NULL,
    state            smallint NOT NULL,
    args             text     NOT NULL,     -- JSON as it came; jsonb would reorder it and refuse \u0000
    tags             text,                  -- JSON object; null when empty
    priority         smallint NOT NULL DEFAULT 0,
    attempt          integer  NOT NULL DEFAULT 0,
    max_attempts     integer  NOT NULL,
    fence            bigint   NOT NULL DEFAULT 0,
    crashes          integer  NOT NULL DEFAULT 0,
    guarantee        smallint,              -- of the newest claim: 0 at_least_once, 1 at_most_once, 2 transactional
    result           text,                  -- JSON
    errors           text,                  -- JSON array; null when empty
    reason           text,
    created_at       bigint   NOT NULL,
    run_at           bigint   NOT NULL,     -- a claim before this time is refused
    due_at           bigint,                -- a relay publishes it then; null when queued, running or final
    queued_at        bigint,
    started_at       bigint,
    finished_at      bigint,
    worker_id        uuid,
    timeout_ms       bigint,
    unique_key       text,                  -- reserved
    idempotency_key  text,
    idempotency_hash bytea,
    traceparent      text
) WITH (
    -- Every write of a task changes `state` or `due_at`, which indexes look at, so none is a heap-only update.
    -- Room in the page still keeps the versions of one task together: fewer pages are dirtied and logged.
    fillfactor = 70,
    -- A task is rewritten about three times within seconds: clean early, before dead entries slow the due index.
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_insert_scale_factor = 0.1,
    autovacuum_analyze_scale_factor = 0.05
);

-- None of these holds a row that completed: a task that is over costs its row and one entry of the primary key.
-- The included columns let queues be counted without reading the tasks themselves.
CREATE INDEX tasks_due     ON tasks (due_at) INCLUDE (queue, state, run_at) WHERE due_at IS NOT NULL;
CREATE INDEX tasks_queued  ON tasks (queue, queued_at) INCLUDE (run_at)     WHERE state = 2;
CREATE INDEX tasks_running ON tasks (worker_id)                             WHERE state = 3;
CREATE INDEX tasks_failed  ON tasks (id) INCLUDE (queue, state)             WHERE state IN (6, 7);

-- Only submissions with a key pay for this one; a key lives as long as its task.
CREATE UNIQUE INDEX tasks_idempotency ON tasks (idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE workers (
    id          uuid    PRIMARY KEY,
    host        text    NOT NULL,
    queues      text[]  NOT NULL,
    kinds       text[]  NOT NULL,
    concurrency integer NOT NULL,
    running     integer NOT NULL DEFAULT 0,
    version     text    NOT NULL,
    started_at  bigint  NOT NULL,
    renewed_at  bigint  NOT NULL,
    expires_at  bigint  NOT NULL,
    dead        boolean NOT NULL DEFAULT false
) WITH (fillfactor = 50);  -- no index looks at what a renewal changes: renewals are heap-only updates

CREATE TABLE queues (
    name    text   PRIMARY KEY,
    head_at bigint NOT NULL  -- the newest queued_at among delivered tasks
) WITH (fillfactor = 50);
