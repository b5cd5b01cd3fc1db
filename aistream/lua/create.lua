-- A new session, pending until its first viewer claims it or its deadline passes.
-- KEYS  1 session hash, 2 content hash, 3 deadlines zset, 4 hash of the init's idempotency key (the session's own without one)
-- ARGV  1 id, 2 ms until it expires, 3 seconds to keep what is owed, 4 owner subject, 5 `start` entry, 6 request, 7 resumeUrl,
--       8 '1' if it is cancelled when its last viewer has left, 9 and 10 created_at and deadline where it is said again, else '',
--       11 the origin that its callback goes to, 12 and 13 digests of the idempotency key and of the body, or '',
--       14 prefix of session keys (same slot)
-- gives {id, created_at, deadline} in ms; the id is an earlier session's where the key was used for the same body, '' where it
-- was used for another
-- Atomic: a session without a deadline would never end, a deadline without a session would be an orphan, and two inits with one
-- key must not both be the first. Idempotent by id.
local known = redis.call('HMGET', KEYS[1], 'created_at', 'deadline')
if known[1] then
  return { ARGV[1], tonumber(known[1]), tonumber(known[2]) }
end
if ARGV[12] ~= '' then
  local first = redis.call('HMGET', KEYS[4], 'id', 'body')
  local earlier = first[1] and redis.call('HMGET', ARGV[14] .. first[1], 'created_at', 'deadline')
  if earlier and earlier[1] then
    return { first[2] == ARGV[13] and first[1] or '', tonumber(earlier[1]), tonumber(earlier[2]) }
  end
  redis.call('HSET', KEYS[4], 'id', ARGV[1], 'body', ARGV[13])
  redis.call('EXPIRE', KEYS[4], ARGV[3])
end
local now = now_ms()
local created_at = tonumber(ARGV[9]) or now
local deadline = tonumber(ARGV[10]) or now + ARGV[2]
redis.call('HSET', KEYS[1], 'state', 'pending', 'epoch', 0, 'subject', ARGV[4], 'start', ARGV[5],
  'created_at', created_at, 'deadline', deadline, 'cancels', ARGV[8], 'origin', ARGV[11], 'init_key', ARGV[12],
  'init_body', ARGV[13])
redis.call('HSET', KEYS[2], 'request', ARGV[6], 'resume_url', ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], deadline, ARGV[1])
return { ARGV[1], created_at, deadline }
