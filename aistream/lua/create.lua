-- A new session, pending until its first viewer claims it or its deadline passes, if the limits allow one more.
-- KEYS  1 session hash, 2 content hash, 3 deadlines zset, 4 hash of the init's idempotency key (the session's own without one),
--       5 the subject's zset of pending sessions, 6.. the counter of each quota that it counts against
-- ARGV  1 id, 2 ms until it expires, 3 seconds to keep what is owed, 4 owner subject, 5 `start` entry, 6 request, 7 resumeUrl,
--       8 '1' if it is cancelled when its last viewer has left, 9 and 10 created_at and deadline where it is said again, else '',
--       11 the origin that its callback goes to, 12 and 13 digests of the idempotency key and of the body, or '',
--       14 prefix of session keys (same slot), 15 what key 5 ends with, 16 most members that it may have,
--       17 '' where there is no room for a new one, 18.. for each quota: its amount, its window in ms
-- gives {id, created_at, deadline, left} in ms; the id is an earlier session's where the key was used for the same body, '' where
--       it was used for another; left: for each quota what is left of it, ms until its window ends; nothing for an earlier session
--       | {'full', 0, 0, {}} where it would be a new one, and there is no room
--       | {'limited', number of the quota that is used up, or 0: too many pending, ms until it may be tried again, left}
-- Atomic: a session without a deadline would never end, a deadline without a session would be an orphan, and two inits with one
-- key must not both be the first. Only what is created counts, once: an init that one quota refuses takes nothing from another.
-- What is said again had been counted. Idempotent by id.
local known = redis.call('HMGET', KEYS[1], 'created_at', 'deadline')
if known[1] then
  return { ARGV[1], tonumber(known[1]), tonumber(known[2]), {} }
end
if ARGV[12] ~= '' then
  local first = redis.call('HMGET', KEYS[4], 'id', 'body')
  local earlier = first[1] and redis.call('HMGET', ARGV[14] .. first[1], 'created_at', 'deadline')
  if earlier and earlier[1] then
    return { first[2] == ARGV[13] and first[1] or '', tonumber(earlier[1]), tonumber(earlier[2]), {} }
  end
end
if ARGV[17] == '' then
  return { 'full', 0, 0, {} }
end
local now = now_ms()
local left = {}
if ARGV[9] == '' then
  local full, wait = nil, 0
  for i = 6, #KEYS do
    local amount, window = tonumber(ARGV[2 * i + 6]), tonumber(ARGV[2 * i + 7])
    local used, ends_in = tonumber(redis.call('GET', KEYS[i])) or 0, redis.call('PTTL', KEYS[i])
    if used >= amount and ends_in > wait then
      full, wait = i - 5, ends_in
    end
    left[#left + 1] = math.max(0, amount - used)
    left[#left + 1] = ends_in > 0 and ends_in or window
  end
  if not full and redis.call('ZCOUNT', KEYS[5], now, '+inf') >= tonumber(ARGV[16]) then
    full, wait = 0, redis.call('ZRANGEBYSCORE', KEYS[5], now, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)[2] - now
  end
  if full then
    return { 'limited', full, wait, left }
  end
  for i = 6, #KEYS do
    if redis.call('INCR', KEYS[i]) == 1 then
      redis.call('PEXPIRE', KEYS[i], ARGV[2 * i + 7])
    end
    left[2 * i - 11] = left[2 * i - 11] - 1
  end
end
if ARGV[12] ~= '' then
  redis.call('HSET', KEYS[4], 'id', ARGV[1], 'body', ARGV[13])
  redis.call('EXPIRE', KEYS[4], ARGV[3])
end
local created_at = tonumber(ARGV[9]) or now
local deadline = tonumber(ARGV[10]) or now + ARGV[2]
redis.call('HSET', KEYS[1], 'state', 'pending', 'epoch', 0, 'subject', ARGV[4], 'start', ARGV[5],
  'created_at', created_at, 'deadline', deadline, 'cancels', ARGV[8], 'origin', ARGV[11], 'init_key', ARGV[12],
  'init_body', ARGV[13], 'pending', ARGV[15])
redis.call('HSET', KEYS[2], 'request', ARGV[6], 'resume_url', ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], deadline, ARGV[1])
-- Not before the first write that a full Redis refuses: after any other it lets a script go on.
redis.call('ZREMRANGEBYSCORE', KEYS[5], '-inf', now)
if deadline > now then
  redis.call('ZADD', KEYS[5], deadline, ARGV[1])
  if redis.call('PTTL', KEYS[5]) < deadline - now then
    redis.call('PEXPIRE', KEYS[5], deadline - now)
  end
end
return { ARGV[1], created_at, deadline, left }
