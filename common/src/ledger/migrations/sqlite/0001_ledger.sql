-- Times are milliseconds since 1970, UTC, unless said otherwise. State codes: common/src/state.rs.
CREATE TABLE tasks (
    id               BLOB    PRIMARY KEY,  -- UUID v7: rows lie in the order of submission
    kind             TEXT    NOT NULL,
    queue            TEXT    NOT NULL,
    state            INTEGER NOT NULL,
    tags             TEXT,                 -- JSON object; null when empty
    priority         INTEGER NOT NULL DEFAULT 0,
    attempt          INTEGER NOT NULL DEFAULT 0,
    max_attempts     INTEGER NOT NULL,
    fence            INTEGER NOT NULL DEFAULT 0,
    crashes          INTEGER NOT NULL DEFAULT 0,
    guarantee        INTEGER,              -- of the newest claim: 0 at_least_once, 1 at_most_once, 2 transactional
    result           TEXT,                 -- JSON
    errors           TEXT,                 -- JSON array; null when empty
    reason           TEXT,
    created_at       INTEGER NOT NULL,
    run_at           INTEGER NOT NULL,     -- a claim before this time is refused
    due_at           INTEGER,              -- a relay publishes it then; null when queued, running or final
    queued_at        INTEGER,
    started_at       INTEGER,
    finished_at      INTEGER,
    worker_id        BLOB,
    timeout_ms       INTEGER,
    unique_key       TEXT,                 -- reserved
    idempotency_key  TEXT,
    idempotency_hash BLOB,
    traceparent      TEXT
) WITHOUT ROWID;

-- Apart from the task, since an update in SQLite rewrites its whole row.
CREATE TABLE task_args (
    id   BLOB PRIMARY KEY,
    args TEXT NOT NULL
) WITHOUT ROWID;

-- None of these holds a row that completed.
-- Columns behind the first are there so that counting does not read the rows.
CREATE INDEX tasks_due     ON tasks (due_at, queue, state, run_at) WHERE due_at IS NOT NULL;
CREATE INDEX tasks_queued  ON tasks (queue, queued_at)             WHERE state = 2;
CREATE INDEX tasks_running ON tasks (worker_id, queue)             WHERE state = 3;
CREATE INDEX tasks_failed  ON tasks (id, queue, state)             WHERE state IN (6, 7);
CREATE UNIQUE INDEX tasks_idempotency ON tasks (idempotency_key) WHERE idempotency_key IS NOT NULL;

CREATE TABLE workers (
    id          BLOB    PRIMARY KEY,
    host        TEXT    NOT NULL,
    queues      TEXT    NOT NULL,   -- JSON array
    kinds       TEXT    NOT NULL,   -- JSON array
    concurrency INTEGER NOT NULL,
    running     INTEGER NOT NULL DEFAULT 0,
    version     TEXT    NOT NULL,
    started_at  INTEGER NOT NULL,
    boot_id     TEXT    NOT NULL,   -- the two times below count from this boot of the machine
    renewed_at  INTEGER NOT NULL,
    expires_at  INTEGER NOT NULL,
    dead        INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

CREATE TABLE queues (
    name    TEXT    PRIMARY KEY,
    head_at INTEGER NOT NULL        -- the newest queued_at among delivered tasks
) WITHOUT ROWID;
