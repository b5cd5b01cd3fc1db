-- A new session, pending until its first viewer claims it or its deadline passes.
-- KEYS  1 session hash, 2 content hash, 3 deadlines zset
-- ARGV  1 id, 2 ms until it expires, 3 seconds to keep what is owed, 4 owner subject, 5 `start` entry, 6 request, 7 resumeUrl,
--       8 '1' if it is cancelled when its last viewer has left, 9 and 10 created_at and deadline where it is said again, else ''
-- gives {created_at, deadline} in ms
-- Atomic: a session without a deadline would never end, a deadline without a session would be an orphan. Idempotent by id.
local known = redis.call('HMGET', KEYS[1], 'created_at', 'deadline')
if known[1] then
  return { tonumber(known[1]), tonumber(known[2]) }
end
local now = now_ms()
local created_at = tonumber(ARGV[9]) or now
local deadline = tonumber(ARGV[10]) or now + ARGV[2]
redis.call('HSET', KEYS[1], 'state', 'pending', 'epoch', 0, 'subject', ARGV[4], 'start', ARGV[5],
  'created_at', created_at, 'deadline', deadline, 'cancels', ARGV[8])
redis.call('HSET', KEYS[2], 'request', ARGV[6], 'resume_url', ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], deadline, ARGV[1])
return { created_at, deadline }
