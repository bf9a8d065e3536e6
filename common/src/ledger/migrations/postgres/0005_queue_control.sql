-- Queues of which no task may start; empty nearly always.
CREATE TABLE paused_queues (
    name      text   PRIMARY KEY,
    paused_at bigint NOT NULL
);

-- What a claim asks: which queues are paused. A pause takes the lock for itself, so it waits for the claims that may
-- not have seen it. The table must be read as it is behind the lock, not as it was when the claim began: a volatile function
-- of PL/pgSQL looks anew with each of its statements.
CREATE FUNCTION tasklane_paused() RETURNS text[] LANGUAGE plpgsql VOLATILE AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(8386110886424704371);
    RETURN (SELECT coalesce(array_agg(name), '{}') FROM paused_queues);
END
$$;
