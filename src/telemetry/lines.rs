//! Writes log lines to standard error from a thread of its own: its reader may stall (a paused terminal, a full pipe,
//! a hanging disk), and the agent must not wait for that.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The number of lines queued before further ones are dropped. An agent writes a few lines an hour, and at worst a
/// few a second.
const CAPACITY: usize = 1024;

#[derive(Default)]
struct State {
    lines: Vec<String>,
    dropped: u64,
    /// Whether the thread is writing lines that it has taken from the queue.
    is_writing: bool,
    is_closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue of lines and the thread that writes them.
///
/// # Guarantees
/// - [`write`](Self::write) never waits for the sink.
/// - Lines are written in order. A line reports how many were dropped, in the place where they were.
pub(super) struct LineWriter(Arc<Shared>);

impl LineWriter {
    /// Starts the thread, which writes to `sink`. `dropped` formats the line that reports dropped lines.
    ///
    /// # Errors
    /// If the thread cannot be created.
    pub(super) fn start(
        sink: impl Write + Send + 'static,
        dropped: impl Fn(u64) -> String + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&of_thread, sink, dropped))?;
        Ok(Self(shared))
    }

    /// Queues a line, or drops it if the queue is full.
    pub(super) fn write(&self, line: String) {
        let mut state = self.0.lock();
        if state.lines.len() < CAPACITY {
            state.lines.push(line);
        } else {
            state.dropped += 1;
        }
        drop(state);
        self.0.changed.notify_all();
    }

    /// Waits until every queued line is written, but not longer than `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let unwritten = |state: &mut State| state.is_writing || !state.lines.is_empty();
        let _ = self.0.changed.wait_timeout_while(self.0.lock(), limit, unwritten);
    }
}

impl Drop for LineWriter {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

fn write_lines(shared: &Shared, mut sink: impl Write, dropped_line: impl Fn(u64) -> String) {
    let idle = |state: &mut State| state.lines.is_empty() && !state.is_closed;
    loop {
        let mut state = shared.changed.wait_while(shared.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if state.lines.is_empty() {
            return;
        }
        // All at once, so that dropped lines were always queued after these.
        let (lines, dropped) = (std::mem::take(&mut state.lines), std::mem::take(&mut state.dropped));
        state.is_writing = true;
        drop(state);
        let last = (dropped > 0).then(|| dropped_line(dropped));
        for line in lines.into_iter().chain(last) {
            // Failing to write the log must not stop a renewal.
            let _ = sink.write_all((line + "\n").as_bytes()).and_then(|()| sink.flush());
        }
        shared.lock().is_writing = false;
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// A sink whose writes block until the test reads the line.
    struct Pipe(SyncSender<String>);

    impl Write for Pipe {
        fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
            let line = String::from_utf8_lossy(buffer).trim_end().to_owned();
            self.0.send(line).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
            Ok(buffer.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn writer() -> (LineWriter, Receiver<String>) {
        let (pipe, lines) = sync_channel(0);
        (LineWriter::start(Pipe(pipe), |count| format!("{count} dropped")).expect("a thread"), lines)
    }

    #[test]
    fn a_blocked_sink_does_not_block_writers_and_dropped_lines_are_counted() {
        let (writer, lines) = writer();
        writer.write("first".to_owned());
        // Wait until the thread is blocked on the first line.
        while !writer.0.lock().is_writing {
            std::thread::yield_now();
        }
        for number in 0..CAPACITY + 7 {
            writer.write(number.to_string());
        }
        writer.flush(Duration::from_millis(1));
        let next = || lines.recv().expect("a line");
        assert_eq!(next(), "first");
        for number in 0..CAPACITY {
            assert_eq!(next(), number.to_string());
        }
        assert_eq!(next(), "7 dropped");
        writer.write("last".to_owned());
        assert_eq!(next(), "last");
    }

    #[test]
    fn lines_are_written_by_flush_and_on_drop() {
        let (writer, lines) = writer();
        let reader = std::thread::spawn(move || lines.iter().collect::<Vec<_>>());
        writer.write("one".to_owned());
        writer.write("two".to_owned());
        writer.flush(Duration::from_secs(60));
        let state = writer.0.lock();
        assert!(state.lines.is_empty() && !state.is_writing);
        drop(state);
        drop(writer);
        assert_eq!(reader.join().expect("no panic"), ["one", "two"]);
    }
}
