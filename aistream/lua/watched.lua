-- Notes which sessions have viewers on this worker, and tells how long others have been without any, on all workers.
-- KEYS  session hashes
-- ARGV  for each '1' if it is watched here, '0' if it is only asked about
-- gives for each the ms since a worker last noted a viewer; -1 where none ever did, or the session is gone
-- Atomic: a note must not create a session that is gone. Idempotent.
local now = now_ms()
local ages = {}
for i = 1, #KEYS do
  local seen = false
  if redis.call('EXISTS', KEYS[i]) == 1 then
    if ARGV[i] == '1' then
      redis.call('HSET', KEYS[i], 'viewer_seen', now)
    end
    seen = redis.call('HGET', KEYS[i], 'viewer_seen')
  end
  ages[i] = seen and now - seen or -1
end
return ages
