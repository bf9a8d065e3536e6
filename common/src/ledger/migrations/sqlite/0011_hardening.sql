-- Which ledger this is: messages carry it, so that a worker tells another ledger's task from a lost one.
CREATE TABLE ledger (
    id BLOB NOT NULL PRIMARY KEY
) WITHOUT ROWID;
INSERT INTO ledger (id) VALUES (randomblob(16));
