//! A process's connections: few, shared by all that it does, and given back when they rest.
//!
//! A connection goes back only after its statement was answered. One that failed, timed out, or whose caller went
//! away in the middle is closed, so that nobody inherits a half-read answer or a dead socket.
//!
//! Where the server has no place left, a process makes do with the connections that it has, and within a few seconds
//! all of its kind shrink to the few that work cannot do without.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, PgConnection};
use tokio::sync::{Notify, Semaphore, SemaphorePermit};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use super::fault::Fault;
use super::session::{self, Wanted};
use crate::ledger::LedgerError;

/// How long all servers of an address together may take to let a connection in.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// A connection unused for so long is asked whether it is alive before it gets a statement.
const PROBE_AFTER: Duration = Duration::from_secs(2);
/// How long that question may take.
const PROBE_LIMIT: Duration = Duration::from_secs(1);
/// A connection unused for so long is given back to the server.
const REST_MAX: Duration = Duration::from_secs(10);
/// How often the resting connections are looked after.
const CARE_PERIOD: Duration = Duration::from_secs(5);
/// How long work waits for a connection of its own process where the server takes no more.
const CROWDED_LIMIT: Duration = Duration::from_secs(2);
/// How often it asks the server again meanwhile.
const CROWDED_PAUSE: Duration = Duration::from_millis(250);
/// A server that would take no more than this is crowded.
const CROWDED_ROOM: i64 = 3;
/// With how many connections a pool makes do on a crowded server, and for how long from when it was seen to be so.
const FRUGAL: usize = 3;
const FRUGAL_FOR: Duration = Duration::from_secs(60);

/// Where connections come from, and what they are for.
#[derive(Debug)]
pub(super) struct Source {
    servers: Vec<PgConnectOptions>,
    /// The server that took the last connection is tried first.
    last: AtomicUsize,
    settings: &'static [(&'static str, &'static str)],
    wanted: Wanted,
}

/// Connections of one kind that any work of the process may borrow.
#[derive(Debug)]
pub(super) struct Pool {
    source: Source,
    most: usize,
    /// How many rest here at least, once there are so many.
    kept: usize,
    room: Semaphore,
    idle: Mutex<Vec<Idle>>,
    /// How many there are, lent ones included.
    live: Arc<AtomicUsize>,
    /// Sessions of an era before are closed instead of kept: their server takes no writes any more.
    era: AtomicU64,
    returned: Notify,
    /// When a session last did what it was asked.
    answered: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Idle {
    session: Session,
    since: Instant,
}

#[derive(Debug)]
struct Session {
    connection: PgConnection,
    mark: Uuid,
    era: u64,
    _live: Live,
}

/// Counts a connection as long as it is there.
#[derive(Debug)]
struct Live(Arc<AtomicUsize>);

impl Live {
    fn count(live: &Arc<AtomicUsize>) -> Self {
        live.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(live))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One purpose's share of a pool: at most so many of its connections at a time.
#[derive(Debug)]
pub(super) struct Connections {
    pool: Arc<Pool>,
    most: usize,
    slots: Semaphore,
}

/// Where the servers are, for people.
pub(super) fn place(servers: &[PgConnectOptions]) -> String {
    let of = |options: &PgConnectOptions| {
        let (user, host, port) = (options.get_username(), options.get_host(), options.get_port());
        let host = options.get_socket().map_or_else(|| host.to_owned(), |socket| socket.display().to_string());
        format!("postgres://{user}@{host}:{port}/{}", options.get_database().unwrap_or(user))
    };
    servers.iter().map(of).collect::<Vec<_>>().join(", ")
}

/// A connection on loan. [`Lent::keep`] gives it back; dropping it closes it.
pub(super) struct Lent<'a> {
    session: Session,
    from: &'a Pool,
    _places: (SemaphorePermit<'a>, SemaphorePermit<'a>),
}

impl Source {
    pub(super) fn new(
        servers: Vec<PgConnectOptions>,
        settings: &'static [(&'static str, &'static str)],
        wanted: Wanted,
    ) -> Self {
        Self { servers, last: AtomicUsize::new(0), settings, wanted }
    }

    /// Where its servers are, for people.
    pub(super) fn place(&self) -> String {
        place(&self.servers)
    }

    /// A new session on the first server that will do.
    pub(super) async fn connect(&self) -> Result<(PgConnection, Uuid), Fault> {
        let (all, first) = (self.servers.len(), self.last.load(Ordering::Relaxed));
        let limit = CONNECT_LIMIT / u32::try_from(all.clamp(1, 6)).unwrap_or(1);
        let mut faults = Vec::new();
        for index in (0..all).map(|n| (first + n) % all) {
            let begun = timeout(limit, async {
                let mut connection = self.servers[index].connect().await?;
                let mark = session::begin(&mut connection, self.settings, self.wanted).await?;
                Ok::<_, Fault>((connection, mark))
            });
            match begun.await.unwrap_or_else(|_| Err(Fault::late("connecting"))) {
                Ok(session) => {
                    self.last.store(index, Ordering::Relaxed);
                    return Ok(session);
                }
                Err(fault) if all == 1 => return Err(fault),
                Err(fault) => faults.push((index, fault)),
            }
        }
        Err(self.none_of(faults))
    }

    /// What to say of several servers, by the one that comes closest to a ledger.
    fn none_of(&self, faults: Vec<(usize, Fault)>) -> Fault {
        let text: Vec<String> = faults
            .iter()
            .map(|(index, fault)| {
                let server = &self.servers[*index];
                format!("{}:{}: {}", server.get_host(), server.get_port(), fault.text())
            })
            .collect();
        let text = text.join("; ");
        let any = |wanted: fn(&Fault) -> bool| faults.iter().any(|(_, fault)| wanted(fault));
        if any(|fault| matches!(fault, Fault::Crowded(_))) {
            Fault::Crowded(text)
        } else if any(|fault| matches!(fault, Fault::ReadOnly(_))) {
            Fault::ReadOnly(text)
        } else if any(|fault| matches!(fault, Fault::Away(_) | Fault::Collided(_))) {
            Fault::Away(text)
        } else {
            Fault::Refused(text)
        }
    }
}

impl Pool {
    /// At most this many connections; `kept` of them are not given back. They are looked after as long as the pool is there.
    pub(super) fn start(source: Source, most: usize, kept: usize) -> Arc<Self> {
        let pool = Arc::new(Self {
            source,
            most,
            kept,
            room: Semaphore::new(most),
            idle: Mutex::default(),
            live: Arc::default(),
            era: AtomicU64::new(0),
            returned: Notify::new(),
            answered: Mutex::default(),
        });
        let weak = Arc::downgrade(&pool);
        crate::vital::spawn("ledger connections", async move {
            let (mut period, mut crowded_at) = (interval(CARE_PERIOD), None);
            period.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                period.tick().await;
                let Some(pool) = weak.upgrade() else { return };
                pool.care(&mut crowded_at).await;
                if let Some(at) = crowded_at.take() {
                    pool.be_frugal(at).await;
                }
            }
        });
        pool
    }

    /// Gives back what rests, and sees that what is kept is good.
    async fn care(&self, crowded_at: &mut Option<Instant>) {
        self.give_back();
        if self.live.load(Ordering::Relaxed) == 0 || self.idle().is_empty() {
            return;
        }
        let Ok(room) = self.room.try_acquire() else { return };
        let Some(mut session) = self.reuse().await else { return };
        let asked = timeout(PROBE_LIMIT, session::room(&mut session.connection)).await;
        match asked {
            Ok(Ok(more)) => {
                if more <= CROWDED_ROOM {
                    *crowded_at = Some(Instant::now());
                }
                self.put(session);
            }
            Ok(Err(_)) | Err(_) => drop(session),
        }
        drop(room);
    }

    /// Closes the connections that nobody has used for a while.
    fn give_back(&self) {
        let mut idle = self.idle();
        // The last are those used last, so the first have rested longest.
        let resting = idle.iter().filter(|one| one.since.elapsed() >= REST_MAX).count();
        let spare = resting.min(idle.len().saturating_sub(self.kept));
        let closed: Vec<Idle> = idle.drain(..spare).collect();
        drop(idle);
        close(closed);
    }

    /// Makes do with few connections until the server has not been crowded for a while.
    async fn be_frugal(&self, crowded_at: Instant) {
        let mut held_back = Vec::new();
        // One after the other: who waits for a connection is not held up by the wait for many.
        while held_back.len() + FRUGAL < self.most
            && let Ok(permit) = self.room.acquire().await
        {
            held_back.push(permit);
            let mut idle = self.idle();
            let spare = idle.len().saturating_sub(self.kept.max(1));
            let closed: Vec<Idle> = idle.drain(..spare).collect();
            drop(idle);
            close(closed);
        }
        let mut until = crowded_at;
        while until.elapsed() < FRUGAL_FOR {
            sleep(CARE_PERIOD).await;
            let mut again = None;
            self.care(&mut again).await;
            until = again.unwrap_or(until);
        }
    }

    /// Forgets the resting connections, and those on loan when they come back.
    fn turn(&self) {
        self.era.fetch_add(1, Ordering::Relaxed);
        let closed: Vec<Idle> = self.idle().drain(..).collect();
        close(closed);
    }

    async fn session(&self) -> Result<Session, Fault> {
        let began = Instant::now();
        loop {
            if let Some(session) = self.reuse().await {
                return Ok(session);
            }
            let era = self.era.load(Ordering::Relaxed);
            match self.source.connect().await {
                Ok((connection, mark)) => {
                    return Ok(Session { connection, mark, era, _live: Live::count(&self.live) });
                }
                Err(Fault::Crowded(_)) if began.elapsed() < CROWDED_LIMIT => {
                    tokio::select! {
                        () = self.returned.notified() => {}
                        () = sleep(CROWDED_PAUSE) => {}
                    }
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    /// The connection used last, if it is still good. All others have rested longer: they go with a bad one.
    async fn reuse(&self) -> Option<Session> {
        let Idle { mut session, since } = self.idle().pop()?;
        if since.elapsed() < PROBE_AFTER {
            return Some(session);
        }
        let checked = timeout(PROBE_LIMIT, session::check(&mut session.connection, session.mark, self.source.wanted));
        match checked.await {
            Ok(Ok(())) => return Some(session),
            Ok(Err(Fault::ReadOnly(_) | Fault::Refused(_))) => self.turn(),
            // Nobody answers a goodbye.
            Ok(Err(_)) | Err(_) => self.idle().clear(),
        }
        None
    }

    fn put(&self, session: Session) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        if session.era == self.era.load(Ordering::Relaxed) {
            self.idle().push(Idle { session, since: Instant::now() });
        }
        self.returned.notify_one();
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says goodbye, so that the server's log has no lost connections.
fn close(sessions: Vec<Idle>) {
    for Idle { session, .. } in sessions {
        let Session { connection, _live, .. } = session;
        tokio::spawn(async move {
            let _ = timeout(PROBE_LIMIT, connection.close()).await;
            drop(_live);
        });
    }
}

impl Connections {
    pub(super) fn new(pool: &Arc<Pool>, most: usize) -> Self {
        Self { pool: Arc::clone(pool), most, slots: Semaphore::new(most) }
    }

    /// How many there can be.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// A connection for one piece of work, as soon as one is free.
    pub(super) async fn lend(&self) -> Result<Lent<'_>, Fault> {
        let closed = |_| Fault::late("the connections are closed");
        let slot = self.slots.acquire().await.map_err(closed)?;
        let room = self.pool.room.acquire().await.map_err(closed)?;
        let session = self.pool.session().await?;
        Ok(Lent { session, from: &self.pool, _places: (slot, room) })
    }

    /// Makes sure that there is a connection.
    pub(super) async fn assure(&self) -> Result<(), Fault> {
        let answered = *self.pool.answered.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = answered.is_some_and(|at| at.elapsed() < REST_MAX);
        if !lately || self.pool.live.load(Ordering::Relaxed) == 0 {
            self.lend().await?.keep();
        }
        Ok(())
    }

    /// Makes sure that the server takes writes; where it does not, none of its connections is used again.
    pub(super) async fn check(&self) -> Result<(), Fault> {
        let mut lent = self.lend().await?;
        let (mark, wanted) = (lent.session.mark, self.pool.source.wanted);
        match session::check(&mut lent, mark, wanted).await {
            Ok(()) => lent.keep(),
            Err(fault) => {
                self.pool.turn();
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Makes sure that what a session is told stays with it: of two that are there at the same time, each has its own mark.
    pub(super) async fn are_apart(&self) -> Result<(), Fault> {
        let mut one = self.lend().await?;
        let mark = one.session.mark;
        match self.pool.source.connect().await {
            Ok((other, _)) => drop(other.close().await),
            // A pooler or server with so few places is found out by the mark of a later one.
            Err(Fault::Refused(text)) => return Err(Fault::Refused(text)),
            Err(_) => {}
        }
        session::check(&mut one, mark, self.pool.source.wanted).await?;
        one.keep();
        Ok(())
    }
}

impl Lent<'_> {
    /// Gives the connection back: what it was asked has been answered.
    pub(super) fn keep(self) {
        self.from.put(self.session);
    }
}

impl Deref for Lent<'_> {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.session.connection
    }
}

impl DerefMut for Lent<'_> {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.session.connection
    }
}

/// A session like the ledger's own.
pub(super) fn own(url: &str, wanted: Wanted) -> Result<Source, LedgerError> {
    Ok(Source::new(super::address::servers(url)?, session::OWN, wanted))
}
