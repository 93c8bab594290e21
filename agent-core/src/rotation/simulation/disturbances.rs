//! What happens to the world that nobody promised against.

use pintle_plugins_api::BackendErrorKind;

use super::world::{BACKENDS, Key, World};
use super::*;

impl World {
    /// Disturbances are far enough apart that what was promised between them can be seen; some come in twos and threes.
    pub(super) fn quiet(&mut self) -> Duration {
        let life = self.life;
        if self.random.one_in(4) { self.random.within(HOUR) } else { RECOVERY * 3 / 2 + self.random.within(life * 2) }
    }

    /// Something happens, and what the agent notices of it at once.
    pub(super) fn disturb(&mut self, state: &State) -> Option<Event> {
        let mut end = self.now;
        let mut event = None;
        let kind = if self.clock_error == 0 { self.random.below(22) } else { 99 };
        match kind {
            // The key in use is lost: for good, or until the device is back.
            0 => {
                // Where a person must bring it back, one thing at a time.
                if let Some(held) = &state.held
                    && (self.policy.enrol_after_key_loss || self.away.is_none())
                {
                    let key = held.key().clone();
                    if !self.policy.enrol_after_key_loss
                        && let Some(known) = self.keys.iter().find(|known| known.name == key).cloned()
                    {
                        end = self.now + self.random.within(DAY);
                        self.away = Some((known, end));
                    }
                    self.remove_key(&key);
                }
                event = Some(self.noticed(state));
            }
            // The device is cleared: the candidate is lost with the key in use, where that is in it.
            1 => {
                let device = state.phase.next_key().map_or(self.policy.backend.clone(), |key| key.backend.clone());
                let held = state.held.as_ref().map(|held| held.key().clone());
                if self.policy.enrol_after_key_loss || held.is_none_or(|held| held.backend != device) {
                    let lost: Vec<_> = self.keys.iter().map(|key| key.name.clone()).collect();
                    lost.iter().filter(|key| key.backend == device).for_each(|key| self.remove_key(key));
                    event = Some(self.noticed(state));
                }
            }
            // The authority is replaced, everywhere at once: whatever was issued is worth nothing.
            2 => {
                self.authorities += 1;
                self.signer_authority = self.authorities;
                self.trusted = vec![self.authorities];
                event = Some(Event::HeldRefused { key_lost: false });
            }
            // The signer alone has another authority, until somebody notices: it gets the right one back, or the API
            // server learns of the new one.
            3..6 => {
                self.authorities += 1;
                self.signer_authority = self.authorities;
                end = self.now + self.random.within((self.life * 2).min(DAY * 3));
                self.signer_mended_at = Some(end);
            }
            // The clock is set wrong by hours, for hours.
            6 | 7 => {
                let error = i64::try_from(self.random.within(HOUR * 12).as_millis()).unwrap_or_default();
                self.clock_error = if kind == 6 { error + 1 } else { -error - 1 };
                self.next_disturbance = self.now + self.random.within(HOUR * 6);
                self.undisturbed_since = self.undisturbed_since.max(self.now);
                return Some(Event::Woke);
            }
            // The device destroys nothing, perhaps until the next certificate has expired too.
            8 if self.refuses_to_destroy => {
                self.undeletable_until = self.now + self.random.within((self.life * 3).min(DAY * 2))
            }
            // A device does not answer, or is locked, or what it answers makes no sense.
            9..11 => {
                let kinds = [BackendErrorKind::Unavailable, BackendErrorKind::Locked, BackendErrorKind::Corrupt];
                let device = self.random.below(2) as usize;
                end = self.now + self.random.within(HOUR * 12);
                self.broken[device] = Some((kinds[self.random.below(3) as usize], end));
            }
            // A device that holds nothing in use is taken out, for longer than anything else waits: keys that are left in
            // it are in nobody's way.
            11 => {
                let device = usize::from(state.held.as_ref().is_none_or(|held| held.key().backend == BACKENDS[0]));
                let until = self.now + self.life * 3 + DAY * 30;
                self.broken[device] = Some((BackendErrorKind::Unavailable, until));
                BACKENDS[1 - device].clone_into(&mut self.policy.backend);
                event = Some(Event::PolicyChanged);
            }
            // New keys go elsewhere.
            12 | 13 => {
                let other = usize::from(self.policy.backend == BACKENDS[0]);
                // Not to where nothing has worked for weeks.
                let broken_until = self.broken[other].map_or(self.now, |(_, until)| until);
                if broken_until.since(self.now) < DAY {
                    end = broken_until;
                    BACKENDS[other].clone_into(&mut self.policy.backend);
                    event = Some(Event::PolicyChanged);
                }
            }
            // Something else is asked for, or not known for a while.
            14 | 15 => {
                self.template += 1;
                self.policy.template = Some(template(self.template));
                event = Some(Event::TemplateChanged);
            }
            16 => {
                self.policy.template = None;
                end = self.now + self.random.within(HOUR * 12);
                self.addresses_back_at = Some(end);
                event = Some(Event::AddressesMissing);
            }
            // Certificates live for another time from now on, or are issued expired for some.
            17 => self.life = [HOUR, 8 * HOUR, DAY, 30 * DAY, 365 * DAY][self.random.below(5) as usize],
            18 => {
                end = self.now + self.random.within(DAY);
                self.issues_expired_until = end;
            }
            // A kubelet rotates beside us.
            19 => event = self.replace_pair(),
            // The clock is set right.
            99 => {
                self.clock_error = 0;
                event = Some(Event::Woke);
            }
            // The control plane is down: for seconds as often as for a day.
            _ => {
                let order = self.random.below(17);
                self.down_until = self.now + Duration::from_secs(1 << order) + self.random.within(DAY / 24);
                end = self.down_until;
            }
        }
        self.undisturbed_since = self.undisturbed_since.max(end);
        self.next_disturbance = self.now.max(end) + self.quiet();
        event
    }

    /// Ends what lasts until now.
    pub(super) fn mend(&mut self) -> Option<Event> {
        let now = self.now;
        if let Some((key, _)) = self.away.take_if(|(_, until)| *until <= now) {
            self.keys.push(key);
        }
        for device in &mut self.broken {
            device.take_if(|(_, until)| *until <= now);
        }
        if self.signer_mended_at.take_if(|until| *until <= now).is_some() {
            if self.random.one_in(2) {
                self.signer_authority = self.trusted[0];
            } else {
                self.trusted.push(self.signer_authority);
            }
        }
        if self.addresses_back_at.take_if(|until| *until <= now).is_some() {
            self.policy.template = Some(template(self.template));
            return Some(Event::TemplateChanged);
        }
        None
    }

    /// When the first of these ends.
    pub(super) fn next_mending(&self) -> Option<UnixTime> {
        let away = self.away.as_ref().map(|(_, until)| *until);
        let broken = self.broken.iter().flatten().map(|(_, until)| *until);
        broken.chain(away).chain(self.signer_mended_at).chain(self.addresses_back_at).min()
    }

    /// What the agent notices of a key that is gone.
    fn noticed(&self, state: &State) -> Event {
        if self.held_key_is_lost(state) { Event::HeldRefused { key_lost: true } } else { Event::Woke }
    }

    /// Something else writes a pair with a key of its own.
    fn replace_pair(&mut self) -> Option<Event> {
        if self.now < self.down_until || self.now < self.issues_expired_until || self.broken[0].is_some() {
            return None;
        }
        let name = KeyName { backend: BACKENDS[0].to_owned(), id: self.foreign_id() };
        let public_key = self.new_public_key();
        self.keys.push(Key { name: name.clone(), public_key: public_key.clone(), ours: false });
        let credential = self.issue(name, self.template, false).installed(self.clock());
        self.published = Some((credential.clone(), public_key));
        Some(Event::PairReplaced(FoundPair { credential, key_is_ours: false }))
    }
}
