-- Who holds a unique key, or held it last: nobody, once that task has finished and the window, if there is one, is over.
CREATE TABLE unique_keys (
    key      text PRIMARY KEY,
    task_id  uuid NOT NULL,
    until_at bigint              -- the end of the window; null: until the task has finished
);
