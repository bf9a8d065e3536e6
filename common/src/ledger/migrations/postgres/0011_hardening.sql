-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id uuid NOT NULL PRIMARY KEY
);
INSERT INTO ledger (id) VALUES (gen_random_uuid());
