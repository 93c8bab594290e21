//! Lines on their way to standard error. Whatever reads it may stop reading (a terminal that is held, a full pipe, a disk
//! that hangs), and nothing that matters may wait for that: lines are written by a thread of their own.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many lines wait to be written before further ones are dropped: an agent writes a few an hour, and in the worst of
/// its troubles a few a second.
const CAPACITY: usize = 1024;

#[derive(Default)]
struct State {
    lines: Vec<String>,
    dropped: u64,
    /// Whether lines have been taken that are not written yet.
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

/// Writes lines, in a thread of its own.
///
/// # Guarantees
/// - [`write`](Self::write) never waits for the sink.
/// - Lines are written in order. Where some were dropped, a line says how many.
pub(super) struct LineWriter(Arc<Shared>);

impl LineWriter {
    /// Starts the thread, which writes to `sink`. `dropped` words the line about dropped lines.
    ///
    /// # Errors
    /// If the system has no thread left.
    pub(super) fn start(
        sink: impl Write + Send + 'static,
        dropped: impl Fn(u64) -> String + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new().name("log".to_owned()).spawn(move || write_lines(&of_thread, sink, dropped))?;
        Ok(Self(shared))
    }

    /// Has this line written, or dropped if too many wait already.
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

    /// Waits until everything is written, for at most this time.
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
        // All of them at once, so that those that were dropped came after these and before any other.
        let (lines, dropped) = (std::mem::take(&mut state.lines), std::mem::take(&mut state.dropped));
        state.is_writing = true;
        drop(state);
        let last = (dropped > 0).then(|| dropped_line(dropped));
        for line in lines.into_iter().chain(last) {
            // A log that cannot be written is no reason to let a certificate expire.
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

    /// A sink that takes no line until the test does.
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
    fn a_sink_that_takes_nothing_delays_nobody_and_what_was_dropped_is_counted() {
        let (writer, lines) = writer();
        writer.write("first".to_owned());
        // Until the thread has taken it, and is stuck with it.
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
    fn what_was_written_is_there_after_a_flush_and_after_the_end() {
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
