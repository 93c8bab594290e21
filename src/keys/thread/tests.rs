use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use pintle_plugins_api::{
    BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId, KeyReference, PublicKey, SignatureScheme,
};

use super::*;

/// Long enough that it never decides a test that passes.
const PATIENT: Duration = Duration::from_secs(60);

/// A device that is at `generate` until it is told to go on, and counts what else it does.
#[derive(Clone)]
struct Device {
    begun: Sender<()>,
    go_on: Arc<Mutex<Receiver<()>>>,
    signatures: Arc<AtomicUsize>,
    opened: Arc<AtomicUsize>,
    panics: Arc<AtomicBool>,
}

impl Device {
    /// The device, and how a test learns that `generate` has begun, and ends it.
    fn new() -> (Self, Receiver<()>, Sender<()>) {
        let ((begun, begins), (end, go_on)) = (channel(), channel());
        let device = Self {
            begun,
            go_on: Arc::new(Mutex::new(go_on)),
            signatures: Arc::default(),
            opened: Arc::default(),
            panics: Arc::default(),
        };
        (device, begins, end)
    }

    fn thread(&self, is_prompt: bool) -> BackendThread {
        let device = self.clone();
        let open = move || {
            device.opened.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(device.clone()) as Box<dyn KeyBackend>)
        };
        let opener = if is_prompt { Opener::prompt(open) } else { Opener::new(open) };
        BackendThread::start("slow", opener).expect("a thread")
    }
}

fn id() -> KeyId {
    KeyId::new(*b"key").expect("an id")
}

fn unsupported<T>() -> Result<T, BackendError> {
    Err(BackendError::new(BackendErrorKind::Unsupported, "not in this test"))
}

impl KeyBackend for Device {
    fn generate(&mut self, _: &KeyId, _: KeyAlgorithm) -> Result<PublicKey, BackendError> {
        self.begun.send(()).expect("the test listens");
        self.go_on.lock().expect("no panic").recv().expect("the test goes on");
        unsupported()
    }

    fn sign(&mut self, _: &KeyId, _: SignatureScheme, _: &[u8]) -> Result<Vec<u8>, BackendError> {
        assert!(!self.panics.load(Ordering::SeqCst), "as the test wants it");
        self.signatures.fetch_add(1, Ordering::SeqCst);
        Ok(Vec::new())
    }

    fn public_key(&mut self, _: &KeyId) -> Result<PublicKey, BackendError> {
        unsupported()
    }

    fn delete(&mut self, _: &KeyId) -> Result<(), BackendError> {
        unsupported()
    }

    fn list(&mut self) -> Result<Vec<KeyId>, BackendError> {
        Ok(Vec::new())
    }

    fn reference(&mut self, _: &KeyId) -> Result<KeyReference, BackendError> {
        unsupported()
    }
}

fn sign(thread: &BackendThread, deadline: Duration) -> Result<Vec<u8>, BackendError> {
    thread.call_blocking(deadline, |backend| backend.sign(&id(), SignatureScheme::Ed25519, b"message"))
}

/// Has the device generate a key in another thread, and answers when it has begun.
fn keep_busy(thread: &BackendThread, begins: &Receiver<()>) -> std::thread::JoinHandle<()> {
    let thread = thread.clone();
    let generating = std::thread::spawn(move || {
        let _ = thread.call_blocking(PATIENT, |backend| backend.generate(&id(), KeyAlgorithm::Rsa4096));
    });
    begins.recv().expect("generate begins");
    generating
}

#[test]
fn a_signature_that_nobody_waits_for_any_more_is_not_made() {
    let (device, begins, end) = Device::new();
    let thread = device.thread(false);
    let generating = keep_busy(&thread, &begins);
    for _ in 0..30 {
        let error = sign(&thread, Duration::from_millis(1)).expect_err("the device is busy");
        assert_eq!(error.kind, BackendErrorKind::Unavailable);
    }
    std::thread::scope(|scope| {
        let live = scope.spawn(|| sign(&thread, PATIENT));
        end.send(()).expect("the device listens");
        live.join().expect("no panic").expect("signed");
    });
    generating.join().expect("no panic");
    assert_eq!(device.signatures.load(Ordering::SeqCst), 1, "only the live one");
}

#[test]
fn a_call_of_the_agent_that_expired_is_not_made_either() {
    let (device, begins, end) = Device::new();
    let thread = device.thread(false);
    let generating = keep_busy(&thread, &begins);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let expired = thread.call(Duration::from_millis(1), |backend| backend.sign(&id(), SignatureScheme::Ed25519, b""));
    assert_eq!(runtime.block_on(expired).expect_err("busy").kind, BackendErrorKind::Unavailable);
    end.send(()).expect("the device listens");
    generating.join().expect("no panic");
    runtime.block_on(thread.call(PATIENT, |backend| backend.list())).expect("answers");
    assert_eq!(device.signatures.load(Ordering::SeqCst), 0);
}

#[test]
fn a_full_queue_says_so_at_once_and_room_that_expired_jobs_take_is_used_again() {
    let (device, begins, end) = Device::new();
    let thread = device.thread(false);
    let generating = keep_busy(&thread, &begins);
    let waiting: Vec<_> = (0..SIGNING_QUEUE)
        .map(|_| {
            let thread = thread.clone();
            std::thread::spawn(move || sign(&thread, PATIENT))
        })
        .collect();
    while thread.jobs.waiting(Purpose::Handshake) < SIGNING_QUEUE {
        std::thread::yield_now();
    }
    let error = sign(&thread, PATIENT).expect_err("there is no room");
    assert!(error.kind == BackendErrorKind::Unavailable && error.detail.contains("busy"), "{error}");
    assert!(error.hint.is_some());
    // What the agent itself asks for still finds room.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let own = thread.clone();
    let listing = std::thread::spawn(move || runtime.block_on(own.call(PATIENT, |backend| backend.list())));
    end.send(()).expect("the device listens");
    for signature in waiting {
        signature.join().expect("no panic").expect("signed");
    }
    listing.join().expect("no panic").expect("listed");
    generating.join().expect("no panic");

    let generating = keep_busy(&thread, &begins);
    for _ in 0..2 * SIGNING_QUEUE {
        let error = sign(&thread, Duration::from_micros(1)).expect_err("busy");
        assert!(error.detail.contains("did not answer"), "{error}");
    }
    end.send(()).expect("the device listens");
    generating.join().expect("no panic");
}

#[test]
fn a_backend_that_panicked_is_opened_again() {
    for is_prompt in [false, true] {
        let (device, _begins, _end) = Device::new();
        let thread = device.thread(is_prompt);
        sign(&thread, PATIENT).expect("signed");
        device.panics.store(true, Ordering::SeqCst);
        let error = sign(&thread, PATIENT).expect_err("it panics");
        assert_eq!(error.kind, BackendErrorKind::Unavailable);
        assert!(error.detail.contains("panicked") && error.hint.is_some(), "{error:?}");
        assert_eq!(thread.health(), Some(error));
        device.panics.store(false, Ordering::SeqCst);
        sign(&thread, PATIENT).expect("signed again");
        assert_eq!((device.opened.load(Ordering::SeqCst), thread.health()), (2, None));
    }
}
