//! Thumbnails of a folder of pictures: computation off the async threads, that stops when its run must stop.
//!
//! With a producer running (`make demo`, or `make programs`, then `target/release/tasklane-producer`), and the same `TASKLANE_LEDGER_URL`:
//!
//! ```sh
//! cargo run --release --example thumbnails -- examples/pictures /tmp/thumbnails
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use image::{ImageFormat, ImageReader};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tasklane_common::task::Fence;
use tasklane_examples::client::{Client, result_of};
use tasklane_examples::worker::LocalWorker;
use tasklane_worker::{Handler, HandlerError, Options, Outcome, Registry, TaskContext};
use tokio_util::sync::CancellationToken;

/// How long the whole folder may take.
const LIMIT: Duration = Duration::from_secs(600);

struct Thumbnail;

#[derive(Deserialize)]
struct Picture {
    from: PathBuf,
    to: PathBuf,
    side: u32,
}

#[derive(Serialize, Deserialize)]
struct Size {
    width: u32,
    height: u32,
}

impl Handler for Thumbnail {
    const KIND: &'static str = "picture.thumbnail";
    type Args = Picture;

    fn options(&self) -> Options {
        Options { timeout: Some(Duration::from_secs(60)), ..Options::default() }
    }

    async fn handle(&self, picture: Picture, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let stop = cx.cancellation.clone();
        // A thread does not end with the future that waits for it. Timeout and shutdown cancel the token; a lost lease
        // drops this future, and the guard with it: in each case the thread stops at its next step.
        let _stops_the_thread = stop.clone().drop_guard();
        let fence = cx.fence;
        let size = tokio::task::spawn_blocking(move || shrink(&picture, fence, &stop)).await??;
        Outcome::complete(size)
    }
}

/// Safe to repeat: the thumbnail appears under its name when it is whole, and a second run makes the same one.
fn shrink(picture: &Picture, fence: Fence, stop: &CancellationToken) -> Result<Size, HandlerError> {
    let go_on = || if stop.is_cancelled() { Err(HandlerError::retry("told to stop")) } else { Ok(()) };
    let reader = ImageReader::open(&picture.from)?.with_guessed_format()?;
    let format = reader.format().filter(|format| matches!(format, ImageFormat::Png | ImageFormat::Jpeg));
    let format = format.ok_or_else(|| HandlerError::discard("neither PNG nor JPEG"))?;
    // No other attempt will read a broken picture.
    let whole = reader.decode().map_err(|error| HandlerError::discard(error.to_string()))?;
    go_on()?;
    let small = whole.thumbnail(picture.side, picture.side);
    go_on()?;
    // Two runs never share a fence, and so never a file.
    let unfinished = picture.to.with_extension(format!("{fence}.part"));
    small.save_with_format(&unfinished, format)?;
    fs::rename(&unfinished, &picture.to)?;
    Ok(Size { width: small.width(), height: small.height() })
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: thumbnails FOLDER-WITH-PICTURES FOLDER-FOR-THUMBNAILS");
    };
    fs::create_dir_all(&to).with_context(|| format!("creating {}", to.display()))?;
    let (pictures, to) = (pictures(&from)?, to.canonicalize()?);
    let tasks: Vec<_> = pictures
        .iter()
        .filter_map(|picture| Some((picture, to.join(picture.file_name()?))))
        .map(|(from, to)| json!({"kind": Thumbnail::KIND, "args": {"from": from, "to": to, "side": 128}}))
        .collect();

    let client = Client::from_env()?;
    let worker = LocalWorker::start(Registry::builder().handler(Thumbnail), &client).await?;
    let ids = client.submit_all(&tasks).await?;
    let mut failed = 0;
    for (id, picture) in ids.into_iter().zip(&pictures) {
        match result_of::<Size>(&client.ended(id, LIMIT).await?) {
            Ok(size) => println!("{} -> {} x {}", picture.display(), size.width, size.height),
            Err(error) => {
                failed += 1;
                println!("{}: {error:#}", picture.display());
            }
        }
    }
    println!("{} thumbnails in {}", pictures.len() - failed, to.display());
    println!("the worker: {}", worker.stop().await?);
    ensure!(failed == 0, "{failed} pictures have none");
    Ok(())
}

/// The pictures of a folder, sorted, by their absolute paths: the worker may have another working folder.
fn pictures(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_picture = |path: &PathBuf| {
        let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
        matches!(extension.as_deref(), Some("png" | "jpg" | "jpeg"))
    };
    let folder = folder.canonicalize().with_context(|| format!("reading {}", folder.display()))?;
    let entries = fs::read_dir(&folder)?.map(|entry| Ok(entry?.path()));
    let mut pictures = entries.collect::<Result<Vec<_>>>()?;
    pictures.retain(is_picture);
    ensure!(!pictures.is_empty(), "no PNG or JPEG in {}", folder.display());
    pictures.sort();
    Ok(pictures)
}
