//! Gives a target its corpus, and mutations of it: the same ones for the same seed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::Target;

/// How long one input may take, in a build without optimisation.
const INPUT_TIME_MAX: Duration = Duration::from_secs(10);
/// The longest mutated input: large ones are tried as they are.
const MUTATED_BYTES_MAX: usize = 4096;
/// How many changes one mutation makes at most.
const CHANGES_MAX: usize = 6;
/// How much of a bad input is printed.
const TOLD_BYTES_MAX: usize = 2048;
/// What has broken parsers before.
const TOKENS: [&[u8]; 24] = [
    b"\0",
    b"\xff",
    b"\xc0\x80",
    b"\xef\xbb\xbf",
    b"\"",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"[[[[[[[[",
    b"{}",
    b"]",
    b"}",
    b",",
    b":",
    b"=",
    b"&",
    b"%",
    b"\n",
    b"\r\n",
    b"null",
    b"-1",
    b"9223372036854775807",
    b"18446744073709551616",
    b"1e999",
];

/// What one run has done.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// How many inputs of the corpus were tried, and large ones.
    pub given: usize,
    /// How many mutations were tried.
    pub mutated: usize,
}

/// Tries the corpus, the large inputs, and `mutations` more. Prints the seed.
///
/// # Errors
/// When the target breaks or hangs on an input, which is written to a file; or when the corpus cannot be read.
pub fn hammer(target: Target, mutations: usize, seed: u64) -> Result<Summary> {
    println!("{}: seed {seed}", target.name);
    let corpus = corpus(target.name)?;
    ensure!(!corpus.is_empty(), "the target {} has no corpus", target.name);
    let mut random = StdRng::seed_from_u64(seed);
    let given = corpus.iter().cloned().chain((target.large)()).collect::<Vec<_>>();
    let tried = given.len();
    let mutated = move |_| mutate(&corpus, &mut random);
    watch(target, given.into_iter().chain((0..mutations).map(mutated)))?;
    Ok(Summary { given: tried, mutated: mutations })
}

/// The folder with a target's corpus.
#[must_use]
pub fn corpus_folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target)
}

/// In the order of the files' names, so that a seed means the same everywhere.
fn corpus(target: &str) -> Result<Vec<Vec<u8>>> {
    let folder = corpus_folder(target);
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    files.iter().map(|file| fs::read(file).with_context(|| format!("reading {}", file.display()))).collect()
}

/// Tries the inputs on a thread of its own, which is left behind when one of them hangs.
fn watch(target: Target, inputs: impl Iterator<Item = Vec<u8>> + Send + 'static) -> Result<()> {
    let current = Arc::new(Mutex::new((Instant::now(), Vec::new())));
    let (end, ended) = mpsc::channel();
    let under_way = Arc::clone(&current);
    thread::spawn(move || {
        let broken = inputs.into_iter().any(|input| {
            *lock(&under_way) = (Instant::now(), input.clone());
            catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err()
        });
        end.send(broken)
    });
    loop {
        let outcome = ended.recv_timeout(INPUT_TIME_MAX / 10);
        let (begun, input) = lock(&current).clone();
        match outcome {
            Ok(false) => return Ok(()),
            Ok(true) => bail!("the target {} breaks {}", target.name, told(target, &input)?),
            Err(RecvTimeoutError::Timeout) if begun.elapsed() < INPUT_TIME_MAX => {}
            Err(_) => bail!("the target {} takes over {INPUT_TIME_MAX:?} {}", target.name, told(target, &input)?),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The input as text, and as a file for the corpus.
fn told(target: Target, input: &[u8]) -> Result<String> {
    let file = env::temp_dir().join(format!("tasklane-fuzz-{}-{}", target.name, process::id()));
    fs::write(&file, input).with_context(|| format!("writing {}", file.display()))?;
    let start = &input[..input.len().min(TOLD_BYTES_MAX)];
    Ok(format!("on the {} bytes in {}: {}", input.len(), file.display(), start.escape_ascii()))
}

/// One input of the corpus, changed here and there.
fn mutate(corpus: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut bytes = corpus.choose(random).cloned().unwrap_or_default();
    bytes.truncate(MUTATED_BYTES_MAX);
    for _ in 0..random.random_range(1..=CHANGES_MAX) {
        let from = random.random_range(0..=bytes.len());
        let to = random.random_range(from..=bytes.len().min(from + 32));
        match random.random_range(0..6) {
            0 if from < bytes.len() => bytes[from] = random.random(),
            1 if from < bytes.len() => bytes[from] ^= 1 << random.random_range(0..8),
            2 => drop(bytes.drain(from..to)),
            3 => {
                let again = bytes[from..to].repeat(random.random_range(1..=8));
                bytes.splice(to..to, again);
            }
            4 => {
                let token = TOKENS.choose(random).copied().unwrap_or_default();
                bytes.splice(from..to, token.iter().copied());
            }
            _ => {
                let other = corpus.choose(random).map(Vec::as_slice).unwrap_or_default();
                let part = other.get(random.random_range(0..=other.len())..).unwrap_or_default();
                bytes.splice(from..to, part.iter().copied().take(MUTATED_BYTES_MAX));
            }
        }
    }
    bytes
}
